// A bundle: its manifest, and the pre-flight that compares files with it before an engine reads them.
#pragma once

#include "json.hpp"
#include "sha256.hpp"

struct Bundle {
    std::string path;
    Json manifest;

    explicit Bundle(const std::string& folder) : path(folder) {
        manifest = Json::file(path + "/accel.json");
        if (manifest["schema"].integer() != 1) throw Error(path + " was written by a newer accel");
    }
    const Json& component(const std::string& name) const {
        const Json& all = manifest["components"];
        if (!all.has(name)) throw Error(path + " has no component " + name);
        return all[name];
    }
    // The path of a listed file, after comparing size and sha256.
    std::string file(const std::string& entry) const {
        if (!manifest["files"].has(entry) || entry.find("..") != std::string::npos || entry[0] == '/')
            throw Error(entry + " is not a file of this bundle");
        const Json& listed = manifest["files"][entry];
        std::string data = read_file(path + "/" + entry);
        if (static_cast<int64_t>(data.size()) != listed["bytes"].integer() || Sha256::hex(data) != listed["sha256"].string)
            throw Error(entry + " was changed after export: get it again, or export the model again");
        return path + "/" + entry;
    }
    std::string graph(const std::string& name) const {
        file(component(name)["weights"].string);  // the graph refers to it
        return file(component(name)["graph"].string);
    }
};
