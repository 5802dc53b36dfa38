// Runs an engine file that `accel build` made: pre-flight, deserialize, run on a stream of its own.
// With ACCEL_RTX it is a program for TensorRT-RTX, whose headers and library have the same classes.
#include <NvInfer.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <filesystem>
#include <iostream>

#include "engine.hpp"

namespace {

namespace fs = std::filesystem;

void check(cudaError_t code) {
    if (code != cudaSuccess) throw Error(std::string("CUDA: ") + cudaGetErrorString(code));
}

class Log : public nvinfer1::ILogger {
public:
    std::string last;
    void log(Severity severity, const char* text) noexcept override {
        if (severity <= Severity::kERROR) last = text;
    }
};
Log logger;

#ifdef ACCEL_RTX
const std::string kEngine = "tensorrt-rtx", kTitle = "TensorRT-RTX";
#else
const std::string kEngine = "tensorrt", kTitle = "TensorRT";
#endif

std::string version() {
    return std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." +
           std::to_string(NV_TENSORRT_PATCH) + "." + std::to_string(NV_TENSORRT_BUILD);
}

// This user's key: engine files are executable code, so only those that carry this user's signature are loaded.
std::string user_key() {
    const char* own = std::getenv("ACCEL_CACHE");
    const char* xdg = std::getenv("XDG_CACHE_HOME");
    const char* home = std::getenv("HOME");
    fs::path cache = own ? fs::path(own) : (xdg && *xdg ? fs::path(xdg) : fs::path(home ? home : "") / ".cache") / "accel";
    return read_file((cache / "plans.key").string());
}

// The reason why an engine file must not be loaded here; empty when it may.
std::string preflight(const Bundle& bundle, const std::string& name, const Json& record, const std::string& text,
                      const std::string& signature, const std::string& data) {
    const Json& identity = record["identity"];
    if (Sha256::hex(data) != record["plan"]["sha256"].string) return "the file was changed after it was built";
    if (signature.compare(0, 64, Sha256::hmac_hex(user_key(), text)) != 0) return "it does not carry your signature";
    const Json& files = bundle.manifest["files"];
    const Json& component = bundle.component(name);
    if (files[component["graph"].string]["sha256"].string != identity["graph_sha256"].string)
        return "it was built from another ONNX graph";
    if (files[component["weights"].string]["sha256"].string != identity["weights_sha256"].string)
        return "it was built from other weights";
    if ((identity.has("engine") ? identity["engine"].string : "tensorrt") != kEngine) return "it is not for " + kTitle;
    if (identity["tensorrt"].string != version())
        return "it was built with " + kTitle + " " + identity["tensorrt"].string + ", this program has " + version();
    int device = 0;
    cudaDeviceProp gpu{};
    check(cudaGetDevice(&device));
    check(cudaGetDeviceProperties(&gpu, device));
#ifdef ACCEL_RTX
    // For the compute capabilities of its targets; without any, for Ampere and newer.
    const auto& targets = identity["targets"].array;
    bool fits = targets.empty() && gpu.major >= 8;
    for (const auto& target : targets)
        fits = fits || target.string == "sm" + std::to_string(gpu.major) + std::to_string(gpu.minor);
    if (!fits) return std::string("it was built for other cards than ") + gpu.name;
#else
    if (identity["gpu"].string != gpu.name) return "it was built for " + identity["gpu"].string;
#endif
    if (identity["options"]["version_compatible"].boolean || identity["options"]["strip_plan"].boolean)
        return "this example loads neither version-compatible nor stripped engines";
    return "";
}

struct Memory {
    void* data = nullptr;
    size_t size = 0;
    ~Memory() { cudaFree(data); }
    void* at_least(size_t wanted) {
        if (wanted > size) {
            check(cudaFree(data));
            check(cudaMalloc(&data, wanted));
            size = wanted;
        }
        return data;
    }
};
Memory scratch;  // shared by all engines of this program: they run one after another

class TensorRt : public Engine {
public:
    TensorRt(const Bundle& bundle, const std::string& component) {
        std::string reason = "there is none", data;
        std::error_code missing;  // a bundle without engine files has no such folder
        for (const auto& folder : fs::directory_iterator(fs::path(bundle.path) / "engines", missing)) {
            fs::path base = folder.path() / component;
            auto with = [&](const char* suffix) { return fs::path(base.string() + suffix); };
            if (!fs::exists(with(".plan")) || !fs::exists(with(".json")) || !fs::exists(with(".sig"))) continue;
            std::string text = read_file(with(".json").string());
            record_ = Json::parse(text);
            data = read_file(with(".plan").string());
            reason = preflight(bundle, component, record_, text, read_file(with(".sig").string()), data);
            if (reason.empty()) break;
        }
        if (!reason.empty())
            throw Error("no engine file of " + component + " can be used: " + reason + "\n  fix: accel build " + bundle.path +
                        " --engine " + kEngine + " --components " + component);
        runtime_.reset(nvinfer1::createInferRuntime(logger));
        engine_.reset(runtime_->deserializeCudaEngine(data.data(), data.size()));
        if (!engine_) throw Error(kTitle + " cannot deserialize the engine of " + component + ": " + logger.last);
        context_.reset(engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        if (!context_) throw Error(kTitle + " gives no execution context: " + logger.last);
        check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    }
    ~TensorRt() override { cudaStreamDestroy(stream_); }

    std::map<std::string, Tensor> run(const std::map<std::string, Tensor>& inputs) override {
        int profile = choose(inputs);
        if (!context_->setOptimizationProfileAsync(profile, stream_)) throw Error("TensorRT refuses the profile");
        for (const auto& [name, tensor] : inputs) {
            nvinfer1::Dims dims{};
            dims.nbDims = static_cast<int32_t>(tensor.shape.size());
            std::copy(tensor.shape.begin(), tensor.shape.end(), dims.d);
            if (!context_->setInputShape(name.c_str(), dims)) throw Error("TensorRT refuses the shape of " + name);
            std::string bytes = encode(tensor, engine_->getTensorDataType(name.c_str()));
            void* memory = buffers_[name].at_least(bytes.size());
            check(cudaMemcpyAsync(memory, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream_));
            check(cudaStreamSynchronize(stream_));  // `bytes` ends here
            context_->setTensorAddress(name.c_str(), memory);
        }
        std::map<std::string, Tensor> outputs;
        for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* name = engine_->getIOTensorName(i);
            if (engine_->getTensorIOMode(name) != nvinfer1::TensorIOMode::kOUTPUT) continue;
            nvinfer1::Dims dims = context_->getTensorShape(name);
            outputs[name].shape.assign(dims.d, dims.d + dims.nbDims);
            context_->setTensorAddress(name, buffers_[name].at_least(count(outputs[name].shape) * width(name)));
        }
        int64_t needed = engine_->getDeviceMemorySizeForProfileV2(profile);
        context_->setDeviceMemoryV2(scratch.at_least(static_cast<size_t>(needed ? needed : 512)), scratch.size);
        if (!context_->enqueueV3(stream_)) throw Error("TensorRT could not run: " + logger.last);
        for (auto& [name, tensor] : outputs) {
            std::string bytes(count(tensor.shape) * width(name.c_str()), '\0');
            check(cudaMemcpyAsync(bytes.data(), buffers_[name].data, bytes.size(), cudaMemcpyDeviceToHost, stream_));
            check(cudaStreamSynchronize(stream_));
            decode(bytes, engine_->getTensorDataType(name.c_str()), tensor);
        }
        return outputs;
    }

private:
    template <typename T>
    using Owned = std::unique_ptr<T>;
    Json record_;
    Owned<nvinfer1::IRuntime> runtime_;
    Owned<nvinfer1::ICudaEngine> engine_;
    Owned<nvinfer1::IExecutionContext> context_;
    std::map<std::string, Memory> buffers_;
    cudaStream_t stream_{};

    // The first profile that takes these shapes.
    int choose(const std::map<std::string, Tensor>& inputs) const {
        const auto& profiles = record_["identity"]["profiles"].array;
        for (size_t i = 0; i < profiles.size(); ++i) {
            bool fits = true;
            for (const auto& [name, ends] : profiles[i]["shapes"].object)
                for (size_t axis = 0; axis < inputs.at(name).shape.size(); ++axis) {
                    int64_t size = inputs.at(name).shape[axis];
                    fits = fits && ends.array[0].array[axis].integer() <= size && size <= ends.array[2].array[axis].integer();
                }
            if (fits) return static_cast<int>(i);
        }
        throw Error("no optimization profile of the engine takes these shapes: accel build BUNDLE --profile ... (one that does)");
    }
    static size_t count(const std::vector<int64_t>& shape) {
        size_t n = 1;
        for (int64_t size : shape) n *= static_cast<size_t>(size);
        return n;
    }
    size_t width(const char* name) const {
        switch (engine_->getTensorDataType(name)) {
            case nvinfer1::DataType::kINT64: return 8;
            case nvinfer1::DataType::kHALF: return 2;
            default: return 4;
        }
    }
    template <typename T, typename V>
    static std::string packed(const std::vector<V>& values) {
        std::vector<T> cast(values.begin(), values.end());
        return std::string(reinterpret_cast<const char*>(cast.data()), cast.size() * sizeof(T));
    }
    static std::string encode(const Tensor& tensor, nvinfer1::DataType type) {
        switch (type) {
            case nvinfer1::DataType::kINT64: return packed<int64_t>(tensor.integers);
            case nvinfer1::DataType::kFLOAT: return packed<float>(tensor.values);
            case nvinfer1::DataType::kHALF: {
                std::string out(tensor.values.size() * 2, '\0');
                for (size_t i = 0; i < tensor.values.size(); ++i) {
                    __half half = __float2half(tensor.values[i]);
                    std::memcpy(&out[2 * i], &half, 2);
                }
                return out;
            }
            default: throw Error("this example feeds float32, float16 and int64");
        }
    }
    static void decode(const std::string& bytes, nvinfer1::DataType type, Tensor& tensor) {
        if (type == nvinfer1::DataType::kFLOAT) {
            tensor.values.resize(bytes.size() / 4);
            std::memcpy(tensor.values.data(), bytes.data(), bytes.size());
        } else if (type == nvinfer1::DataType::kHALF) {
            tensor.values.resize(bytes.size() / 2);
            for (size_t i = 0; i < tensor.values.size(); ++i) {
                __half half;
                std::memcpy(&half, &bytes[2 * i], 2);
                tensor.values[i] = __half2float(half);
            }
        } else {
            throw Error("this example reads float32 and float16");
        }
    }
};

}  // namespace

std::unique_ptr<Engine> load(const Bundle& bundle, const std::string& component) {
    return std::make_unique<TensorRt>(bundle, component);
}
