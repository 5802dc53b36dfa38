// A prompt to an image with one ONNX file, on ONNX Runtime's C API: `draw GRAPH.onnx TOKENIZER "a prompt" out.ppm [SEED]`.
//
//   g++ -std=c++17 draw.cpp -I ORT/include -I ../embed_cpp/src -L ORT/lib -lonnxruntime -o draw
//
// GRAPH.onnx is model.onnx of `accel export MODEL FOLDER --target single-graph` (int8: model.uint8.onnx), for a model
// without guidance; TOKENIZER is its folder tokenizer/. ORT is ONNX Runtime's release for your system.
#include <onnxruntime_c_api.h>

#include <fstream>
#include <iostream>

#include "tokenizer.hpp"

const OrtApi* ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);

void check(OrtStatus* status) {
    if (!status) return;
    std::cerr << "error: " << ort->GetErrorMessage(status) << "\n";
    std::exit(1);
}

template <class T>
OrtValue* tensor(T* values, size_t count, std::vector<int64_t> shape, ONNXTensorElementDataType type) {
    OrtMemoryInfo* cpu;
    OrtValue* made;
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &cpu));
    check(ort->CreateTensorWithDataAsOrtValue(cpu, values, count * sizeof(T), shape.data(), shape.size(), type, &made));
    return made;
}

int main(int argc, char** argv) {
    if (argc < 5) return std::cerr << "usage: draw GRAPH.onnx TOKENIZER PROMPT OUT.ppm [SEED]\n", 2;
    std::vector<int64_t> ids = Tokenizer(argv[2]).encode(argv[3]);
    int32_t seed = argc > 5 ? std::stoi(argv[5]) : 7;

    OrtEnv* env;
    OrtSessionOptions* options;
    OrtSession* session;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "draw", &env));
    check(ort->CreateSessionOptions(&options));
    check(ort->CreateSession(env, argv[1], options, &session));

    const char *inputs[] = {"input_ids", "seed"}, *outputs[] = {"image"};
    OrtValue* given[] = {tensor(ids.data(), ids.size(), {1, int64_t(ids.size())}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64),
                         tensor(&seed, 1, {1}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32)};
    OrtValue* image = nullptr;
    check(ort->Run(session, nullptr, inputs, given, 2, outputs, 1, &image));

    OrtTensorTypeAndShapeInfo* info;
    int64_t shape[4];  // [1, height, width, 3]
    char* pixels;
    check(ort->GetTensorTypeAndShape(image, &info));
    check(ort->GetDimensions(info, shape, 4));
    check(ort->GetTensorMutableData(image, reinterpret_cast<void**>(&pixels)));
    std::ofstream file(argv[4], std::ios::binary);
    file << "P6\n" << shape[2] << " " << shape[1] << "\n255\n";
    file.write(pixels, shape[1] * shape[2] * 3);
    return file ? 0 : 1;
}
