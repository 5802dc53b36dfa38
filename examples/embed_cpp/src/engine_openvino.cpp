// The component's ONNX graph on OpenVINO's CPU plugin, in float32.
#include <openvino/openvino.hpp>

#include "engine.hpp"

namespace {

class OpenVino : public Engine {
public:
    OpenVino(const Bundle& bundle, const std::string& component) {
        static ov::Core core;
        if (bundle.component(component)["dtype"].string != "float32")
            throw Error("this example feeds float32 on a CPU: export with --precision fp32");
        auto model = core.compile_model(bundle.graph(component), "CPU",
                                        ov::hint::inference_precision(ov::element::f32),
                                        ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY));
        names_ = model.outputs();
        request_ = model.create_infer_request();
    }

    std::map<std::string, Tensor> run(const std::map<std::string, Tensor>& inputs) override {
        for (const auto& [name, tensor] : inputs) {
            ov::Shape shape(tensor.shape.begin(), tensor.shape.end());
            bool whole = !tensor.integers.empty();
            ov::Tensor fed(whole ? ov::element::i64 : ov::element::f32, shape);
            if (whole)
                std::copy(tensor.integers.begin(), tensor.integers.end(), fed.data<int64_t>());
            else
                std::copy(tensor.values.begin(), tensor.values.end(), fed.data<float>());
            request_.set_tensor(name, fed);
        }
        request_.infer();
        std::map<std::string, Tensor> outputs;
        for (const auto& output : names_) {
            ov::Tensor found = request_.get_tensor(output);
            ov::Shape shape = found.get_shape();
            Tensor& tensor = outputs[output.get_any_name()];
            tensor.shape.assign(shape.begin(), shape.end());
            tensor.values.assign(found.data<float>(), found.data<float>() + found.get_size());
        }
        return outputs;
    }

private:
    ov::InferRequest request_;
    std::vector<ov::Output<const ov::Node>> names_;
};

}  // namespace

std::unique_ptr<Engine> load(const Bundle& bundle, const std::string& component) {
    return std::make_unique<OpenVino>(bundle, component);
}
