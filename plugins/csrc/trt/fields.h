// The fields of a custom op: read by name from a parser's or a plan's fields, with type and length checked, and written back.
//
// An op names its fields once, in `static void fields(self, visit)`; the visitors are here. A field is an int32_t, a float, a
// std::vector of either, or a std::string. A field that does not fit throws std::invalid_argument, which the adapters log.
#pragma once

#include <NvInferRuntime.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace darktrt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

template <typename T> struct FieldTypeOf;
template <> struct FieldTypeOf<int32_t> {
    static constexpr PluginFieldType type = PluginFieldType::kINT32;
    static constexpr const char* name = "32-bit integers";
};
template <> struct FieldTypeOf<float> {
    static constexpr PluginFieldType type = PluginFieldType::kFLOAT32;
    static constexpr const char* name = "32-bit floats";
};
template <> struct FieldTypeOf<char> {
    static constexpr PluginFieldType type = PluginFieldType::kCHAR;
    static constexpr const char* name = "characters";
};

// Ignores fields that the op does not have, such as plugin_version.
class FieldReader {
public:
    explicit FieldReader(const PluginFieldCollection& fields) : fields_(fields) {}

    template <typename T> void operator()(const char* name, T& value) const
    {
        const auto values = read<T>(name);
        if (values.size() != 1) {
            throw std::invalid_argument(quoted(name) + " has " + std::to_string(values.size()) + " values, not one");
        }
        value = values[0];
    }

    template <typename T> void operator()(const char* name, std::vector<T>& value) const { value = read<T>(name); }

    // Some parsers count the closing NUL, some do not.
    void operator()(const char* name, std::string& value) const
    {
        const auto characters = read<char>(name);
        value.assign(characters.begin(), characters.end());
        value.erase(value.find_last_not_of('\0') + 1);
    }

private:
    const PluginFieldCollection fields_;

    static std::string quoted(const char* name) { return "field '" + std::string(name) + "'"; }

    template <typename T> std::vector<T> read(const char* name) const
    {
        const PluginField& field = find(name);
        if (field.type != FieldTypeOf<T>::type) {
            throw std::invalid_argument(quoted(name) + " must be of " + FieldTypeOf<T>::name);
        }
        if (field.length < 0 || (field.length > 0 && !field.data)) {
            throw std::invalid_argument(quoted(name) + " has no data");
        }
        std::vector<T> values(field.length);  // copied as bytes, for those in a plan are unaligned
        if (field.length > 0) {
            std::memcpy(values.data(), field.data, values.size() * sizeof(T));
        }
        return values;
    }

    const PluginField& find(const char* name) const
    {
        for (int32_t i = 0; i < fields_.nbFields; ++i) {
            const PluginField& field = fields_.fields[i];
            if (field.name && std::strcmp(field.name, name) == 0) {
                return field;
            }
        }
        throw std::invalid_argument(quoted(name) + " is missing");
    }
};

class FieldWriter {
public:
    std::vector<PluginField> fields;

    template <typename T> void operator()(const char* name, const T& value)
    {
        fields.emplace_back(name, &value, FieldTypeOf<T>::type, 1);
    }

    template <typename T> void operator()(const char* name, const std::vector<T>& value)
    {
        fields.emplace_back(name, value.data(), FieldTypeOf<T>::type, static_cast<int32_t>(value.size()));
    }

    void operator()(const char* name, const std::string& value)
    {
        fields.emplace_back(name, value.data(), PluginFieldType::kCHAR, static_cast<int32_t>(value.size()));
    }
};

// An op from fields, checked.
template <typename Op> Op op_from(const PluginFieldCollection& fields)
{
    Op op{};
    Op::fields(op, FieldReader(fields));
    op.check();
    return op;
}

// The fields of an op; they point into it.
template <typename Op> std::vector<PluginField> fields_of(const Op& op)
{
    FieldWriter writer;
    Op::fields(op, writer);
    return writer.fields;
}

// The names and types of an op's fields.
template <typename Op> const PluginFieldCollection* field_names()
{
    static const std::vector<PluginField> names = [] {
        const Op op{};
        auto fields = fields_of(op);
        for (auto& field : fields) {
            field.data = nullptr;
        }
        return fields;
    }();
    static const PluginFieldCollection collection{static_cast<int32_t>(names.size()), names.data()};
    return &collection;
}

}  // namespace darktrt
