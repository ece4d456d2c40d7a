// libdarktrt_plugins: registering the creators of the plugins with TensorRT.
//
// The library is not linked against TensorRT, so it can be loaded before TensorRT, after it, and without it:
//   - loading it by dlopen (trtexec --staticPlugins, Triton's plugins=, ctypes) registers the creators with the TensorRT in the
//     process, also where that was loaded with RTLD_LOCAL, as Python's tensorrt is;
//   - under LD_PRELOAD it loads libnvinfer itself where the program has not, as a library linked against it would;
//   - IPluginRegistry::loadLibrary (trtexec --dynamicPlugins) asks for the creators by getPluginCreators or getCreators.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ops.h"
#if NV_TENSORRT_MAJOR >= 10
#include "plugin_v3.h"
#else
#include "plugin_v2.h"
#endif

#define DARKTRT_TEXT(x) DARKTRT_TEXT_OF(x)
#define DARKTRT_TEXT_OF(x) #x
#define DARKTRT_MAJOR DARKTRT_TEXT(NV_TENSORRT_MAJOR)
#define DARKTRT_TENSORRT DARKTRT_MAJOR "." DARKTRT_TEXT(NV_TENSORRT_MINOR) "." DARKTRT_TEXT(NV_TENSORRT_PATCH)
#define DARKTRT_NAME(Op) " " #Op ":" DARKTRT_PLUGIN_VERSION
#define DARKTRT_CREATOR(Op) new darktrt::Creator<darktrt::Op>,
#define DARKTRT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using darktrt::CreatorInterface;

// plugins/library.py finds it in the file by its first word, without loading the library.
constexpr char info[] = "darktrt-plugins={\"darktrt\": \"" DARKTRT_VERSION "\", \"tensorrt\": \"" DARKTRT_TENSORRT
                        "\", \"sms\": \"" DARKTRT_SMS "\", \"plugins\": \"" DARKTRT_PLUGINS(DARKTRT_NAME) "\"}";

// Never freed: TensorRT's registry may outlive this library.
const std::vector<CreatorInterface*>& creators()
{
    static const auto& list = *new std::vector<CreatorInterface*>{DARKTRT_PLUGINS(DARKTRT_CREATOR)};
    return list;
}

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
std::atomic<bool> registered_here{false};

bool preloaded()
{
    Dl_info self{};
    const char* list = std::getenv("LD_PRELOAD");
    if (!list || !dladdr(info, &self) || !self.dli_fname) {
        return false;
    }
    const char* slash = std::strrchr(self.dli_fname, '/');
    return std::strstr(list, slash ? slash + 1 : self.dli_fname) != nullptr;
}

// A function of the TensorRT in this process, of the version that this library is built for if there are several;
// it stays loaded.
template <typename Function> Function* tensorrt(const char* name)
{
    void* const library = dlopen("libnvinfer.so." DARKTRT_MAJOR, RTLD_LAZY | (preloaded() ? 0 : RTLD_NOLOAD));
    return reinterpret_cast<Function*>(dlsym(library ? library : RTLD_DEFAULT, name));
}

nvinfer1::IPluginRegistry* registry()
{
    auto* const version = tensorrt<int32_t()>("getInferLibVersion");
    auto* const get = tensorrt<nvinfer1::IPluginRegistry*()>("getPluginRegistry");
    if (!version || !get) {
        return nullptr;
    }
    const int32_t found = version(), major = found / (found < 100000 ? 1000 : 10000);
    if (major != NV_TENSORRT_MAJOR) {
        std::fprintf(stderr, "libdarktrt_plugins is built for TensorRT %d, this is TensorRT %d: no plugin is registered\n",
                     NV_TENSORRT_MAJOR, major);
        return nullptr;
    }
    return get();
}

__attribute__((constructor)) void register_creators()
{
    if (auto* const found = registry()) {
        for (auto* creator : creators()) {
            found->registerCreator(*creator, "");
        }
        registered_here = true;
    }
}

// The creators for a loader that registers them itself, which fails for registered ones.
CreatorInterface* const* handed_over(int32_t& count)
{
    if (registered_here.exchange(false)) {
        for (auto* creator : creators()) {
            registry()->deregisterCreator(*creator);
        }
    }
    count = static_cast<int32_t>(creators().size());
    return creators().data();
}

}  // namespace

void darktrt::log_error(const std::string& message) noexcept
{
    auto* const finder = logger_finder.load();
    auto* const global = tensorrt<nvinfer1::ILogger*()>("getLogger");
    if (auto* const logger = finder ? finder->findLogger() : global ? global() : nullptr) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
    } else {
        std::fprintf(stderr, "%s\n", message.c_str());
    }
}

DARKTRT_EXPORT const char* darktrt_plugins_info()
{
    return std::strchr(info, '{');
}

DARKTRT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    logger_finder = finder;
}

#if NV_TENSORRT_MAJOR >= 10
DARKTRT_EXPORT CreatorInterface* const* getCreators(int32_t& count)
{
    return handed_over(count);
}
#else
DARKTRT_EXPORT CreatorInterface* const* getPluginCreators(int32_t& count)
{
    return handed_over(count);
}
#endif
