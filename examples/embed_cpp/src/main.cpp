// Prompt to image in C++, with everything it needs from the bundle: `embed BUNDLE "a prompt" out.ppm [noise.f32]`.
//
// The loop has fixed steps: DMD2's (x0, fresh noise, repeat; arXiv 2405.14867) where the manifest says dmd2, else DDIM
// (arXiv 2010.02502, eta = 0) with classifier-free guidance over the manifest's number of steps.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <random>

#include "engine.hpp"
#include "tokenizer.hpp"

namespace {

struct Schedule {
    std::vector<double> alpha_bar;
    bool v_prediction;
    double last;  // alpha_bar after the final step
    int64_t offset;
    int64_t T;

    explicit Schedule(const Bundle& bundle) {
        Json config = Json::file(bundle.file("scheduler/scheduler_config.json"));
        if (config["beta_schedule"].string != "scaled_linear") throw Error("this example knows scaled_linear only");
        T = config["num_train_timesteps"].integer();
        double low = std::sqrt(config["beta_start"].number), high = std::sqrt(config["beta_end"].number), product = 1;
        for (int64_t t = 0; t < T; ++t) {
            double root = low + (high - low) * double(t) / double(T - 1);
            alpha_bar.push_back(product *= 1 - root * root);
        }
        v_prediction = config.has("prediction_type") && config["prediction_type"].string == "v_prediction";
        bool to_one = config.has("set_alpha_to_one") && config["set_alpha_to_one"].boolean;
        last = to_one ? 1.0 : alpha_bar[0];
        offset = config.has("steps_offset") ? config["steps_offset"].integer() : 0;
    }
};

// x0 and eps of a prediction at alpha_bar = a.
void split(const Schedule& schedule, double a, float x, float prediction, double& x0, double& eps) {
    double alpha = std::sqrt(a), sigma = std::sqrt(1 - a);
    eps = schedule.v_prediction ? sigma * x + alpha * prediction : prediction;
    x0 = schedule.v_prediction ? alpha * x - sigma * prediction : (x - sigma * eps) / alpha;
}

Tensor twice(const Tensor& tensor) {
    Tensor out = tensor;
    out.shape[0] *= 2;
    out.values.insert(out.values.end(), tensor.values.begin(), tensor.values.end());
    return out;
}

void write_ppm(const std::string& path, const Tensor& pixels) {
    int64_t height = pixels.shape[2], width = pixels.shape[3], plane = height * width;
    std::ofstream file(path, std::ios::binary);
    file << "P6\n" << width << " " << height << "\n255\n";
    for (int64_t i = 0; i < plane; ++i)
        for (int64_t channel = 0; channel < 3; ++channel) {
            float value = std::clamp(pixels.values[channel * plane + i] / 2 + 0.5f, 0.0f, 1.0f);
            file.put(static_cast<char>(std::lround(value * 255)));
        }
    if (!file) throw Error(path + " cannot be written");
}

int run(int argc, char** argv) {
    if (argc < 4 || argc > 5) {
        std::cerr << "usage: embed BUNDLE PROMPT OUT.ppm [NOISE.f32]\n";
        return 2;
    }
    Bundle bundle(argv[1]);
    const Json& constants = bundle.manifest["pipeline"];
    const Json& own = bundle.manifest["sampler"];
    if (bundle.manifest["components"].has("text_encoder_2")) throw Error("this example knows one text encoder (SD 1, 2)");
    Schedule schedule(bundle);
    Tokenizer tokenizer(bundle.path + "/tokenizer");
    auto text_encoder = load(bundle, "text_encoder"), unet = load(bundle, "unet"), vae = load(bundle, "vae_decoder");

    double guidance = own["guidance"].number;
    bool few_steps = own["name"].string == "dmd2", guided = guidance > 1;
    std::vector<int64_t> timesteps;
    if (own.has("timesteps")) {
        for (const Json& t : own["timesteps"].array) timesteps.push_back(t.integer());
    } else {
        int64_t steps = own["steps"].integer();
        for (int64_t i = steps - 1; i >= 0; --i) timesteps.push_back(i * (schedule.T / steps) + schedule.offset);
    }

    Tensor ids{{guided ? 2 : 1, int64_t(Tokenizer::length)}, {}, {}};
    for (const char* text : {"", static_cast<const char*>(argv[2])}) {
        if (!*text && !guided && argv[2] != text) continue;
        for (int64_t id : tokenizer.encode(text)) ids.integers.push_back(id);
    }
    Tensor context = text_encoder->run({{"input_ids", ids}})["last_hidden_state"];

    int64_t side = constants["native_size"].integer() / constants["vae_scale"].integer();
    Tensor x{{1, constants["latent_channels"].integer(), side, side}, {}, {}};
    size_t count = static_cast<size_t>(x.shape[1] * side * side);
    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    std::string given = argc == 5 ? read_file(argv[4]) : "";
    x.values.resize(count);
    if (argc == 5 && given.size() < count * 4) throw Error(std::string(argv[4]) + " is too short for the latents");
    for (size_t i = 0; i < count; ++i) {
        x.values[i] = normal(generator);
        if (argc == 5) std::memcpy(&x.values[i], &given[4 * i], 4);
    }

    for (size_t step = 0; step < timesteps.size(); ++step) {
        int64_t t = timesteps[step];
        Tensor time{{}, {static_cast<float>(t)}, {}};
        Tensor out = unet->run({{"sample", guided ? twice(x) : x}, {"timestep", time},
                                {"encoder_hidden_states", context}})["out_sample"];
        bool final_step = step + 1 == timesteps.size();
        double a = schedule.alpha_bar[t], next = final_step ? schedule.last : schedule.alpha_bar[timesteps[step + 1]];
        for (size_t i = 0; i < count; ++i) {
            float prediction = out.values[i];
            if (guided) prediction += static_cast<float>(guidance) * (out.values[count + i] - out.values[i]);
            double x0, eps;
            split(schedule, a, x.values[i], prediction, x0, eps);
            if (few_steps) eps = final_step ? 0 : normal(generator);
            double keep = few_steps && final_step ? 1 : std::sqrt(next);
            x.values[i] = static_cast<float>(keep * x0 + std::sqrt(1 - next) * eps);
        }
        std::cerr << "step " << step + 1 << " of " << timesteps.size() << "\r";
    }
    std::cerr << "\n";

    for (float& value : x.values)
        value = static_cast<float>(value / constants["scaling_factor"].number + constants["shift_factor"].number);
    write_ppm(argv[3], vae->run({{"latent_sample", x}})["sample"]);
    std::cout << argv[3] << "\n";
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run(argc, argv);
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 1;
    }
}
