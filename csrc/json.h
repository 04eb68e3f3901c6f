#pragma once
// JSON in a string, which an operator can return.
#include <string>

#define ERCN_STRING_(...) #__VA_ARGS__
#define ERCN_STRING(...) ERCN_STRING_(__VA_ARGS__)

namespace ercn {

inline std::string json(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') quoted += '\\';
    quoted += c;
  }
  return quoted + '"';
}
inline std::string json(const char* text) { return json(std::string(text)); }
inline std::string json(bool value) { return value ? "true" : "false"; }
template <typename Number>
std::string json(Number value) {
  return std::to_string(value);
}

class JsonObject {
 public:
  template <typename Value>
  JsonObject& add(const char* key, const Value& value) {
    return add_json(key, json(value));
  }
  JsonObject& add_json(const char* key, const std::string& value) {
    text_ += (text_.empty() ? "" : ", ") + json(key) + ": " + value;
    return *this;
  }
  std::string str() const { return "{" + text_ + "}"; }

 private:
  std::string text_;
};

class JsonList {
 public:
  void add_json(const std::string& value) { text_ += (text_.empty() ? "" : ", ") + value; }
  std::string str() const { return "[" + text_ + "]"; }

 private:
  std::string text_;
};

}  // namespace ercn
