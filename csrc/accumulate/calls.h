// Calling nodes while a plan runs.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "blocks/plan.h"
#include "tape/tape.h"

namespace wengert::accumulate {

// Thrown by a call of a node that gives no gradient at all along some edges (custom Functions may): nothing is connected through
// them, as far as PyTorch is concerned, and another plan has to be run.
struct GaveNothing {
  std::int32_t node;
  std::vector<std::size_t> edges;
};

// A node gives a gradient along an edge along which it once gave none.
struct GaveSomething {};

// How many of some rows a kernel takes at a time, on the CPU, where it reads and writes so many bytes for all of them: as many as
// the caches hold, but `least`.
constexpr std::int64_t kLeastRowsAtOnce = 16;
std::int64_t within_caches(double bytes, std::int64_t rows, std::int64_t least = kLeastRowsAtOnce);

// The calls of one derivation.  Custom Functions are called once, however many plans it takes.
class Calls {
 public:
  explicit Calls(tape::Tape& tape) : tape_(tape) {}
  ~Calls();  // leaves the tape as it was
  Calls(const Calls&) = delete;
  Calls& operator=(const Calls&) = delete;

  // Cotangents and results have step.batch leading axes.  Results are defined where wanted.
  std::vector<at::Tensor> operator()(const blocks::CallNode& step, const blocks::Plan& plan, std::vector<at::Tensor> cotangents);

  // Takes the edges off the tape, of which another plan is to be made and run.  Throws Unsupported where PyTorch would call a
  // custom Function without any gradient.
  void disconnect(const GaveNothing& call);

  // What was disconnected, if the next derivation of that structure may begin with it: every such node is called by the plan,
  // which shows whether it still gives nothing.
  std::optional<std::vector<GaveNothing>> lessons(const blocks::Plan& plan) const;
  // Begins with it.  A call that gives something after all throws GaveSomething.
  void begin_with(const std::vector<GaveNothing>& lessons);
  void forget();  // the tape is as it was

 private:
  struct Made {
    std::int32_t node;
    std::vector<at::Tensor> results;
  };
  std::vector<at::Tensor> replayed(const blocks::CallNode& step, const blocks::Plan& plan);
  void fill_zeros(const blocks::CallNode& step, const blocks::Plan& plan, std::vector<at::Tensor>& cotangents) const;
  bool is_last(const blocks::CallNode& step, const blocks::Plan& plan) const;
  std::size_t custom_reached() const;
  void take_off(const GaveNothing& call);

  tape::Tape& tape_;
  std::vector<Made> made_;  // by custom Functions
  std::size_t next_ = 0;
  std::vector<std::pair<tape::Value*, tape::Value>> taken_off_;
  std::vector<GaveNothing> disconnected_;
};

}  // namespace wengert::accumulate
