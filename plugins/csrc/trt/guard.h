// The common part of both adapters: TensorRT's log, calls that let no exception out, and checks of TensorRT's arguments.
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kernels.h"

namespace darktrt {

// Writes an error to TensorRT's log, or to stderr where there is none.
void log_error(const std::string& message) noexcept;

// The result of `call`. If it throws, logs the exception under the op's name and returns `otherwise`.
template <typename Op, typename Call, typename Result> Result guarded(Call call, Result otherwise) noexcept
{
    try {
        return call();
    } catch (const std::exception& error) {
        log_error(std::string(Op::name) + ": " + error.what());
        return otherwise;
    }
}

template <typename Op> void check_inputs(const Op& op, const nvinfer1::Dims* dims, int32_t count)
{
    if (count != op.inputs()) {
        throw std::invalid_argument("has " + std::to_string(count) + " inputs, its fields ask for " +
                                    std::to_string(op.inputs()));
    }
    op.check_shapes(dims);
}

// Shapes as far as they are known while a network is built; -1 for unknown sizes.
inline std::vector<nvinfer1::Dims> known_dims(const nvinfer1::DimsExprs* shapes, int32_t count)
{
    std::vector<nvinfer1::Dims> known(count);
    for (int32_t i = 0; i < count; ++i) {
        known[i].nbDims = shapes[i].nbDims;
        for (int32_t axis = 0; axis < shapes[i].nbDims; ++axis) {
            const auto* extent = shapes[i].d[axis];
            known[i].d[axis] = extent->isConstant() ? extent->getConstantValue() : -1;
        }
    }
    return known;
}

template <typename Op>
int32_t enqueued(const Op& op, const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out,
                 const void* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept
{
    const auto run = [&] {
        std::vector<nvinfer1::Dims> dims;
        for (int32_t i = 0; i < op.inputs(); ++i) {
            dims.push_back(in[i].dims);
        }
        op.check_shapes(dims.data());
        const int32_t status = op.enqueue(in, out, inputs, outputs, workspace, stream);
        if (status != 0) {
            throw std::runtime_error(status == DARKTRT_UNSUPPORTED ? "no kernel takes these shapes and types"
                                                                   : cudaGetErrorString(static_cast<cudaError_t>(status)));
        }
        return status;
    };
    return guarded<Op>(run, int32_t{-1});
}

}  // namespace darktrt
