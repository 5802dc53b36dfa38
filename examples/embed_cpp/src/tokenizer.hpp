// CLIP's tokenizer (arXiv 2103.00020) for prompts in ASCII: lower case, words, digits one by one, runs of punctuation,
// each split by byte-pair merges (arXiv 1508.07909), then [start, tokens, end, padding ...] of 77 ids.
#pragma once

#include <cctype>
#include <climits>
#include <cstring>

#include "json.hpp"

class Tokenizer {
public:
    static constexpr size_t length = 77;

    explicit Tokenizer(const std::string& folder) {
        Json vocabulary = Json::file(folder + "/vocab.json");
        for (const auto& [token, id] : vocabulary.object) ids_[token] = id.integer();
        std::istringstream merges(read_file(folder + "/merges.txt"));
        int rank = 0;
        for (std::string line; std::getline(merges, line);) {
            size_t gap = line.find(' ');
            if (line.rfind("#version", 0) == 0 || gap == std::string::npos) continue;
            if (line.back() == '\r') line.pop_back();
            ranks_[{line.substr(0, gap), line.substr(gap + 1)}] = rank++;
        }
    }

    std::vector<int64_t> encode(const std::string& prompt) const {
        std::vector<int64_t> out{id("<|startoftext|>")};
        for (const std::string& word : words(prompt))
            for (const std::string& token : pieces(word)) out.push_back(id(token));
        if (out.size() > length - 1) out.resize(length - 1);
        out.resize(length, id("<|endoftext|>"));
        return out;
    }

private:
    std::map<std::string, int64_t> ids_;
    std::map<std::pair<std::string, std::string>, int> ranks_;

    int64_t id(const std::string& token) const {
        auto found = ids_.find(token);
        if (found == ids_.end()) throw Error("the tokenizer has no token " + token);
        return found->second;
    }
    static std::vector<std::string> words(const std::string& prompt) {
        static const char* endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
        std::string text;
        for (unsigned char c : prompt) {
            if (c > 127) throw Error("this example reads ASCII prompts only");
            text += static_cast<char>(std::tolower(c));
        }
        std::vector<std::string> out;
        for (size_t i = 0; i < text.size();) {
            unsigned char c = text[i];
            size_t begin = i;
            if (std::isspace(c)) {
                ++i;
                continue;
            }
            for (const char* ending : endings)
                if (c == '\'' && text.compare(i, std::strlen(ending), ending) == 0) {
                    i += std::strlen(ending);
                    break;
                }
            if (i == begin) {
                if (std::isalpha(c))
                    while (i < text.size() && std::isalpha(static_cast<unsigned char>(text[i]))) ++i;
                else if (std::isdigit(c))
                    ++i;
                else
                    while (i < text.size() && !std::isspace(static_cast<unsigned char>(text[i])) &&
                           !std::isalnum(static_cast<unsigned char>(text[i])))
                        ++i;
            }
            out.push_back(text.substr(begin, i - begin));
        }
        return out;
    }
    std::vector<std::string> pieces(const std::string& word) const {
        std::vector<std::string> parts;
        for (char c : word) parts.emplace_back(1, c);
        parts.back() += "</w>";
        while (parts.size() > 1) {
            size_t best = 0;
            int lowest = INT_MAX;
            for (size_t i = 0; i + 1 < parts.size(); ++i) {
                auto found = ranks_.find({parts[i], parts[i + 1]});
                if (found != ranks_.end() && found->second < lowest) {
                    lowest = found->second;
                    best = i;
                }
            }
            if (lowest == INT_MAX) break;
            parts[best] += parts[best + 1];
            parts.erase(parts.begin() + best + 1);
        }
        return parts;
    }
};
