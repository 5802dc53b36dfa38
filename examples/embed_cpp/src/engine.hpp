// What a program needs of an engine: named float tensors in, named float tensors out.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"

struct Tensor {
    std::vector<int64_t> shape;
    std::vector<float> values;     // of floating-point tensors, whatever the engine computes in
    std::vector<int64_t> integers; // of token ids
};

struct Engine {
    virtual ~Engine() = default;
    virtual std::map<std::string, Tensor> run(const std::map<std::string, Tensor>& inputs) = 0;
};

// Loads a component of a bundle; each program is linked with one engine. Throws Error with the reason.
std::unique_ptr<Engine> load(const Bundle& bundle, const std::string& component);
