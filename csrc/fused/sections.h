// How the instructions of a long program become code: stretches of straight code, and loops over stretches that repeat with
// operands further on, as the steps of a rollout or the layers of a chain do.  Compiling one long stretch takes time that grows
// faster than its length.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "fused/program.h"

namespace wengert::fused {

// What an instruction reads, in place of a register, which holds several values one after the other.
struct Argument {
  enum class Kind : std::uint8_t { load, constant, value } kind;
  std::int32_t index;  // of the load, the constant or the instruction that computes the value

  bool operator==(const Argument&) const = default;
};

// Instructions first .. first + passes * length - 1.  Of passes > 1, each reads the constants of the one before; its loads are a
// fixed number of loads further on; and it reads values that are `length` further on, or of before the section and the same.
// Later instructions read values of the last pass only.
struct Section {
  std::int32_t first, length, passes;

  std::int32_t end() const { return first + length * passes; }
  std::int32_t spared() const { return length * (passes - 1); }  // instructions that do not stand in the code
};

inline constexpr std::int32_t kOneStretch = 128;  // instructions of a program that is a single section

class Listing {
 public:
  // kinds[i] says what load i is; only loads of the same kind take turns in a loop.
  Listing(const Bytecode& code, std::span<const std::uint8_t> kinds);

  const std::vector<Section>& sections() const { return sections_; }
  std::span<const Argument> arguments(std::int32_t instruction) const;
  std::span<const Argument> outputs() const { return outputs_; }
  // The instruction that reads the value last; the number of instructions where an output does.
  std::int32_t last_use(std::int32_t value) const { return last_use_[value]; }
  // How far argument k of an instruction in the first pass of a loop is from that of the next pass.
  std::int32_t step(const Section& section, std::int32_t instruction, int k) const;
  std::int32_t instructions() const;  // as they stand in the code, loops once

 private:
  std::int32_t passes_from(std::int32_t first, std::int32_t length) const;
  bool repeats(std::int32_t first, std::int32_t length, std::int32_t pass) const;
  void find_sections();

  const Bytecode& code_;
  std::span<const std::uint8_t> kinds_;
  std::vector<std::array<Argument, kMaxArity>> arguments_;
  std::vector<Argument> outputs_;
  std::vector<std::int32_t> last_use_;
  std::vector<Section> sections_;
};

}  // namespace wengert::fused
