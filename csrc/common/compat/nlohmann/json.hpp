// PyTorch's functorch headers include <nlohmann/json.hpp>, which its wheels do not carry, for two inline functions that are never
// called here.  Declarations are enough for them.
#pragma once
#include <string>

namespace nlohmann {

class json {
 public:
  json();
  template <class T>
  explicit json(const T&);
  std::string dump() const;
  static json parse(const std::string&);
  template <class T>
  T get() const;
};

}  // namespace nlohmann
