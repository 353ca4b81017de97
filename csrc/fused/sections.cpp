#include "fused/sections.h"

#include <algorithm>
#include <unordered_map>

namespace wengert::fused {
namespace {

constexpr std::int32_t kStretch = 64;       // instructions of a section of straight code
constexpr std::int32_t kLongestPass = 512;  // instructions of a loop
constexpr std::int32_t kFewestPasses = 3;
constexpr std::int32_t kWorthALoop = 32;  // instructions it spares
constexpr std::int32_t kWindow = 4;       // instructions that are compared to find where passes may begin
constexpr int kMostCandidates = 16;       // lengths of a pass that are tried at an instruction

std::size_t mix(std::size_t hash, std::size_t value) { return (hash ^ value) * 0x9E3779B97F4A7C15ull ^ (hash >> 29); }

}  // namespace

Listing::Listing(const Bytecode& code, std::span<const std::uint8_t> kinds) : code_(code), kinds_(kinds) {
  const Register loads = static_cast<Register>(code.loads.size());
  const Register slots = loads + static_cast<Register>(code.constants.size());
  const std::int32_t count = static_cast<std::int32_t>(code.instructions.size());
  std::vector<std::int32_t> writer(code.slots, -1);
  auto argument = [&](Register used) -> Argument {
    if (used < loads) return {Argument::Kind::load, static_cast<std::int32_t>(used)};
    if (used < slots) return {Argument::Kind::constant, static_cast<std::int32_t>(used - loads)};
    return {Argument::Kind::value, writer[used - slots]};
  };
  arguments_.resize(count);
  last_use_.assign(count, -1);
  for (std::int32_t i = 0; i < count; ++i) {
    const Instruction& instruction = code.instructions[i];
    for (int k = 0; k < info(instruction.prim).arity; ++k) {
      arguments_[i][k] = argument(instruction.args[k]);
      if (arguments_[i][k].kind == Argument::Kind::value) last_use_[arguments_[i][k].index] = i;
    }
    writer[instruction.result - slots] = i;
  }
  for (const Register output : code.outputs) {
    outputs_.push_back(argument(output));
    if (outputs_.back().kind == Argument::Kind::value) last_use_[outputs_.back().index] = count;
  }
  find_sections();
}

std::span<const Argument> Listing::arguments(std::int32_t instruction) const {
  return {arguments_[instruction].data(), static_cast<std::size_t>(info(code_.instructions[instruction].prim).arity)};
}

std::int32_t Listing::step(const Section& section, std::int32_t instruction, int k) const {
  return arguments_[instruction + section.length][k].index - arguments_[instruction][k].index;
}

std::int32_t Listing::instructions() const {
  std::int32_t sum = 0;
  for (const Section& section : sections_) sum += section.length;
  return sum;
}

// Whether pass `pass` does what the first one does, the steps of its arguments being those from the first pass to the second.
bool Listing::repeats(std::int32_t first, std::int32_t length, std::int32_t pass) const {
  for (std::int32_t q = first; q < first + length; ++q) {
    const std::int32_t other = q + pass * length;
    if (code_.instructions[q].prim != code_.instructions[other].prim) return false;
    if (last_use_[other - length] >= first + (pass + 1) * length) return false;
    for (int k = 0; k < info(code_.instructions[q].prim).arity; ++k) {
      const Argument &at_first = arguments_[q][k], &at_second = arguments_[q + length][k], &at = arguments_[other][k];
      const std::int32_t step = at_second.index - at_first.index;
      if (at_second.kind != at_first.kind || at.kind != at_first.kind || at.index != at_first.index + pass * step) return false;
      switch (at.kind) {
        case Argument::Kind::constant:
          if (step != 0) return false;
          break;
        case Argument::Kind::load:
          if (kinds_[at.index] != kinds_[at_first.index]) return false;
          break;
        case Argument::Kind::value:
          if (step == 0 ? at.index >= first : step != length || at_first.index < first - length) return false;
          break;
      }
    }
  }
  return true;
}

std::int32_t Listing::passes_from(std::int32_t first, std::int32_t length) const {
  const std::int32_t most = (static_cast<std::int32_t>(arguments_.size()) - first) / length;
  std::int32_t passes = 1;
  while (passes < most && repeats(first, length, passes)) ++passes;
  return passes;
}

void Listing::find_sections() {
  const std::int32_t count = static_cast<std::int32_t>(arguments_.size());
  if (count <= kOneStretch) {
    sections_.push_back({0, count, 1});
    return;
  }
  std::vector<std::size_t> looks(count);
  for (std::int32_t i = 0; i < count; ++i) {
    looks[i] = static_cast<std::size_t>(code_.instructions[i].prim);
    for (const Argument& argument : arguments(i)) looks[i] = mix(looks[i], static_cast<std::size_t>(argument.kind));
  }
  std::vector<std::int32_t> next(count, -1);  // instruction that looks the same, with those after it
  std::unordered_map<std::size_t, std::int32_t> seen;
  for (std::int32_t i = count - kWindow; i >= 0; --i) {
    std::size_t window = 0;
    for (std::int32_t k = 0; k < kWindow; ++k) window = mix(window, looks[i + k]);
    auto [at, fresh] = seen.try_emplace(window, i);
    if (!fresh) next[i] = at->second;
    at->second = i;
  }
  std::int32_t begin = 0;
  const auto straight = [&](std::int32_t end) {
    for (; begin < end; begin += sections_.back().length) sections_.push_back({begin, std::min(kStretch, end - begin), 1});
  };
  for (std::int32_t i = 0; i < count;) {
    Section best{i, 1, 1};
    int tried = 0;
    for (std::int32_t j = next[i]; j >= 0 && j - i <= kLongestPass && tried < kMostCandidates; j = next[j], ++tried) {
      const std::int32_t passes = passes_from(i, j - i);
      const Section loop{i, j - i, passes};
      if (passes >= kFewestPasses && loop.spared() > best.spared()) best = loop;
    }
    if (best.spared() < kWorthALoop) {
      ++i;
      continue;
    }
    straight(i);
    sections_.push_back(best);
    begin = i = best.end();
  }
  straight(count);
}

}  // namespace wengert::fused
