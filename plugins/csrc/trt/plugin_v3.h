// The adapter for TensorRT 10 and 11: IPluginV3 around any op.
#pragma once

#include <NvInferRuntime.h>

#include <vector>

#include "fields.h"
#include "guard.h"
#include "ops.h"

namespace darktrt {

using nvinfer1::AsciiChar;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginV3;
using nvinfer1::PluginCapabilityType;

template <typename Op>
class Plugin final : public IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
public:
    explicit Plugin(const Op& op)
        : op_(op), fields_(fields_of(op_)), collection_{static_cast<int32_t>(fields_.size()), fields_.data()}
    {}

    nvinfer1::IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override
    {
        return guarded<Op>([&] { return new Plugin(op_); }, static_cast<Plugin*>(nullptr));
    }

    const AsciiChar* getPluginName() const noexcept override { return Op::name; }
    const AsciiChar* getPluginVersion() const noexcept override { return DARKTRT_PLUGIN_VERSION; }
    const AsciiChar* getPluginNamespace() const noexcept override { return ""; }

    int32_t getNbOutputs() const noexcept override { return Op::outputs_count; }

    int32_t getOutputDataTypes(DataType* outputs, int32_t count, const DataType* inputs, int32_t) const noexcept override
    {
        for (int32_t i = 0; i < count; ++i) {
            outputs[i] = op_.output_type(i, inputs);
        }
        return 0;
    }

    int32_t getOutputShapes(const DimsExprs* inputs, int32_t count, const DimsExprs*, int32_t, DimsExprs* outputs,
                            int32_t output_count, nvinfer1::IExprBuilder& builder) noexcept override
    {
        const auto shapes = [&] {
            check_inputs(op_, known_dims(inputs, count).data(), count);
            for (int32_t i = 0; i < output_count; ++i) {
                outputs[i] = op_.output_shape(i, inputs, builder);
            }
            return int32_t{0};
        };
        return guarded<Op>(shapes, int32_t{-1});
    }

    bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* tensors, int32_t, int32_t) noexcept override
    {
        const auto supported = [&] {
            std::vector<PluginTensorDesc> plain;
            for (int32_t i = 0; i <= pos; ++i) {
                plain.push_back(tensors[i].desc);
            }
            return op_.supports(pos, plain.data());
        };
        return guarded<Op>(supported, false);
    }

    int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*, int32_t) noexcept override
    {
        return 0;
    }

    size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t count, const DynamicPluginTensorDesc*,
                            int32_t) const noexcept override
    {
        const auto size = [&] {
            std::vector<Dims> dims;
            for (int32_t i = 0; i < count; ++i) {
                dims.push_back(inputs[i].max);
            }
            return op_.workspace(dims.data());
        };
        return guarded<Op>(size, size_t{0});
    }

    int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override { return 0; }

    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs, void* const* outputs,
                    void* workspace, cudaStream_t stream) noexcept override
    {
        return enqueued(op_, in, out, inputs, outputs, workspace, stream);
    }

    IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

private:
    const Op op_;
    const std::vector<PluginField> fields_;
    const PluginFieldCollection collection_;
};

using CreatorInterface = nvinfer1::IPluginCreatorInterface;

template <typename Op> class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    const AsciiChar* getPluginName() const noexcept override { return Op::name; }
    const AsciiChar* getPluginVersion() const noexcept override { return DARKTRT_PLUGIN_VERSION; }
    const AsciiChar* getPluginNamespace() const noexcept override { return ""; }
    const PluginFieldCollection* getFieldNames() noexcept override { return field_names<Op>(); }

    IPluginV3* createPlugin(const AsciiChar*, const PluginFieldCollection* fields, nvinfer1::TensorRTPhase) noexcept override
    {
        return guarded<Op>([&] { return new Plugin<Op>(op_from<Op>(*fields)); }, static_cast<Plugin<Op>*>(nullptr));
    }
};

}  // namespace darktrt
