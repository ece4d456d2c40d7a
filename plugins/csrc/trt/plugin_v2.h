// The adapter for TensorRT 8.6 to 9: IPluginV2DynamicExt around any op.
#pragma once

#include <NvInferRuntime.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fields.h"
#include "guard.h"
#include "ops.h"

namespace darktrt {

using nvinfer1::AsciiChar;
using nvinfer1::IPluginV2DynamicExt;

// A plan contains an op as this line, then for every field its name with NUL, type, length and data.
constexpr char serialized_mark[] = "darktrt plugin fields 1";

inline size_t element_bytes(PluginFieldType type)
{
    return type == PluginFieldType::kCHAR ? sizeof(char) : sizeof(int32_t);
}

inline std::string serialized(const std::vector<PluginField>& fields)
{
    std::string bytes(serialized_mark, sizeof(serialized_mark));
    const auto append = [&](const void* data, size_t size) { bytes.append(static_cast<const char*>(data), size); };
    for (const auto& field : fields) {
        append(field.name, std::strlen(field.name) + 1);
        append(&field.type, sizeof(field.type));
        append(&field.length, sizeof(field.length));
        append(field.data, field.length * element_bytes(field.type));
    }
    return bytes;
}

// The fields in the bytes of serialized(); they point into them.
inline std::vector<PluginField> deserialized(const char* bytes, size_t size)
{
    const char* const end = bytes + size;
    const auto take = [&](size_t length) {
        if (length > static_cast<size_t>(end - bytes)) {
            throw std::invalid_argument("the plan ends inside a field");
        }
        return std::exchange(bytes, bytes + length);
    };
    if (size < sizeof(serialized_mark) ||
        std::memcmp(take(sizeof(serialized_mark)), serialized_mark, sizeof(serialized_mark)) != 0) {
        throw std::invalid_argument("the plan was built with another version of darktrt's plugins; build it again");
    }
    std::vector<PluginField> fields;
    while (bytes < end) {
        PluginField field(take(strnlen(bytes, end - bytes) + 1));
        std::memcpy(&field.type, take(sizeof(field.type)), sizeof(field.type));
        std::memcpy(&field.length, take(sizeof(field.length)), sizeof(field.length));
        field.data = take(field.length * element_bytes(field.type));
        fields.push_back(field);
    }
    return fields;
}

template <typename Op> class Plugin final : public IPluginV2DynamicExt {
public:
    explicit Plugin(const Op& op) : op_(op), bytes_(serialized(fields_of(op_))) {}

    DimsExprs getOutputDimensions(int32_t index, const DimsExprs* inputs, int32_t count,
                                  nvinfer1::IExprBuilder& builder) noexcept override
    {
        const auto shape = [&] {
            check_inputs(op_, known_dims(inputs, count).data(), count);
            return op_.output_shape(index, inputs, builder);
        };
        return guarded<Op>(shape, DimsExprs{-1, {}});
    }

    bool supportsFormatCombination(int32_t pos, const PluginTensorDesc* tensors, int32_t, int32_t) noexcept override
    {
        return op_.supports(pos, tensors);
    }

    void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                         int32_t) noexcept override
    {}

    size_t getWorkspaceSize(const PluginTensorDesc* inputs, int32_t count, const PluginTensorDesc*,
                            int32_t) const noexcept override
    {
        const auto size = [&] {
            std::vector<Dims> dims;
            for (int32_t i = 0; i < count; ++i) {
                dims.push_back(inputs[i].dims);
            }
            return op_.workspace(dims.data());
        };
        return guarded<Op>(size, size_t{0});
    }

    int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc* out, const void* const* inputs, void* const* outputs,
                    void* workspace, cudaStream_t stream) noexcept override
    {
        return enqueued(op_, in, out, inputs, outputs, workspace, stream);
    }

    DataType getOutputDataType(int32_t index, const DataType* inputs, int32_t) const noexcept override
    {
        return op_.output_type(index, inputs);
    }

    IPluginV2DynamicExt* clone() const noexcept override
    {
        return guarded<Op>([&] { return new Plugin(op_); }, static_cast<Plugin*>(nullptr));
    }

    int32_t getNbOutputs() const noexcept override { return Op::outputs_count; }
    const AsciiChar* getPluginType() const noexcept override { return Op::name; }
    const AsciiChar* getPluginVersion() const noexcept override { return DARKTRT_PLUGIN_VERSION; }
    const AsciiChar* getPluginNamespace() const noexcept override { return ""; }
    void setPluginNamespace(const AsciiChar*) noexcept override {}
    size_t getSerializationSize() const noexcept override { return bytes_.size(); }
    void serialize(void* buffer) const noexcept override { std::memcpy(buffer, bytes_.data(), bytes_.size()); }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }

private:
    const Op op_;
    const std::string bytes_;
};

using CreatorInterface = nvinfer1::IPluginCreator;

template <typename Op> class Creator final : public CreatorInterface {
public:
    const AsciiChar* getPluginName() const noexcept override { return Op::name; }
    const AsciiChar* getPluginVersion() const noexcept override { return DARKTRT_PLUGIN_VERSION; }
    const AsciiChar* getPluginNamespace() const noexcept override { return ""; }
    void setPluginNamespace(const AsciiChar*) noexcept override {}
    const PluginFieldCollection* getFieldNames() noexcept override { return field_names<Op>(); }

    Plugin<Op>* createPlugin(const AsciiChar*, const PluginFieldCollection* fields) noexcept override
    {
        return guarded<Op>([&] { return new Plugin<Op>(op_from<Op>(*fields)); }, static_cast<Plugin<Op>*>(nullptr));
    }

    Plugin<Op>* deserializePlugin(const AsciiChar* name, const void* bytes, size_t size) noexcept override
    {
        const auto make = [&] {
            const auto fields = deserialized(static_cast<const char*>(bytes), size);
            const PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
            return createPlugin(name, &collection);
        };
        return guarded<Op>(make, static_cast<Plugin<Op>*>(nullptr));
    }
};

}  // namespace darktrt
