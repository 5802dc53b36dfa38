// A small JSON reader: what accel.json and a tokenizer's vocabulary need, and nothing more.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Error : std::runtime_error {  // a sentence for people: what is wrong, and what to do
    using std::runtime_error::runtime_error;
};

inline std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Error(path + " cannot be read");
    std::ostringstream text;
    text << file.rdbuf();
    return text.str();
}

class Json {
public:
    enum class Kind { null, boolean, number, string, array, object };
    Kind kind = Kind::null;
    bool boolean = false;
    double number = 0;
    std::string string;
    std::vector<Json> array;
    std::map<std::string, Json> object;

    static Json parse(const std::string& text) {
        const char* at = text.c_str();
        const char* end = at + text.size();
        Json value = read(at, end, 0);
        space(at, end);
        if (at != end) throw Error("JSON: something follows the document");
        return value;
    }
    static Json file(const std::string& path) {
        try {
            return parse(read_file(path));
        } catch (const Error& error) {
            throw Error(path + ": " + error.what());
        }
    }
    bool has(const std::string& key) const { return object.count(key) > 0; }
    const Json& operator[](const std::string& key) const {
        auto found = object.find(key);
        if (found == object.end()) throw Error("JSON: there is no " + key);
        return found->second;
    }
    int64_t integer() const { return static_cast<int64_t>(number); }

private:
    static void space(const char*& at, const char* end) {
        while (at < end && (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r')) ++at;
    }
    static bool take(const char*& at, const char* end, const std::string& word) {
        if (static_cast<size_t>(end - at) < word.size() || word.compare(0, word.size(), at, word.size())) return false;
        at += word.size();
        return true;
    }
    static void append_utf8(std::string& out, uint32_t code) {
        if (code < 0x80) {
            out += static_cast<char>(code);
        } else if (code < 0x800) {
            out += static_cast<char>(0xC0 | code >> 6);
            out += static_cast<char>(0x80 | (code & 63));
        } else if (code < 0x10000) {
            out += static_cast<char>(0xE0 | code >> 12);
            out += static_cast<char>(0x80 | (code >> 6 & 63));
            out += static_cast<char>(0x80 | (code & 63));
        } else {
            out += static_cast<char>(0xF0 | code >> 18);
            out += static_cast<char>(0x80 | (code >> 12 & 63));
            out += static_cast<char>(0x80 | (code >> 6 & 63));
            out += static_cast<char>(0x80 | (code & 63));
        }
    }
    static uint32_t hex(const char*& at, const char* end) {
        if (end - at < 4) throw Error("JSON: a cut-off escape");
        uint32_t code = std::stoul(std::string(at, 4), nullptr, 16);
        at += 4;
        return code;
    }
    static std::string text(const char*& at, const char* end) {
        std::string out;
        for (++at; at < end && *at != '"';) {
            if (*at != '\\') {
                out += *at++;
                continue;
            }
            if (++at == end) break;
            char escape = *at++;
            if (escape == 'u') {
                uint32_t code = hex(at, end);
                if (code >= 0xD800 && code < 0xDC00 && take(at, end, "\\u"))
                    code = 0x10000 + ((code - 0xD800) << 10) + (hex(at, end) - 0xDC00);
                append_utf8(out, code);
            } else {
                static const std::map<char, char> plain{{'n', '\n'}, {'t', '\t'}, {'r', '\r'}, {'b', '\b'}, {'f', '\f'}};
                auto found = plain.find(escape);
                out += found == plain.end() ? escape : found->second;
            }
        }
        if (at == end) throw Error("JSON: a string has no end");
        ++at;
        return out;
    }
    static Json read(const char*& at, const char* end, int depth) {
        if (depth > 100) throw Error("JSON: nested too deeply");
        space(at, end);
        if (at == end) throw Error("JSON: it ends too early");
        Json value;
        if (*at == '"') {
            value.kind = Kind::string;
            value.string = text(at, end);
        } else if (*at == '{' || *at == '[') {
            char close = *at == '{' ? '}' : ']';
            value.kind = *at++ == '{' ? Kind::object : Kind::array;
            for (space(at, end); at < end && *at != close; space(at, end)) {
                if (value.kind == Kind::object) {
                    if (*at != '"') throw Error("JSON: a key must be a string");
                    std::string key = text(at, end);
                    space(at, end);
                    if (!take(at, end, ":")) throw Error("JSON: a colon is missing");
                    value.object[key] = read(at, end, depth + 1);
                } else {
                    value.array.push_back(read(at, end, depth + 1));
                }
                space(at, end);
                if (!take(at, end, ",")) break;
            }
            if (!take(at, end, std::string(1, close))) throw Error("JSON: a bracket is missing");
        } else if (take(at, end, "true")) {
            value.kind = Kind::boolean;
            value.boolean = true;
        } else if (take(at, end, "false")) {
            value.kind = Kind::boolean;
        } else if (!take(at, end, "null")) {
            char* stop = nullptr;
            value.kind = Kind::number;
            value.number = std::strtod(at, &stop);
            if (stop == at) throw Error("JSON: an unknown word");
            at = stop;
        }
        return value;
    }
};
