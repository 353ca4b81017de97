#include "blocks/verify.h"

#include <algorithm>
#include <span>
#include <vector>

namespace wengert::blocks {

namespace {

struct Unsound {
  std::string what;
};

class Verifier {
 public:
  explicit Verifier(const Plan& plan) : plan_(plan), stored_(plan.slots.size(), 0), written_(plan.slots.size(), false) {}

  void run() {
    expect(plan_.given <= plan_.slots.size(), "more given slots than slots");
    for (std::size_t s = 0; s < plan_.given; ++s) written_[s] = true;
    for (const Step& step : plan_.steps) {
      std::visit([this](const auto& s) { check(s); }, step);
      ++at_;
    }
    expect(plan_.results.size() == plan_.result_shapes.size(), "results without a shape");
    for (std::size_t r = 0; r < plan_.results.size(); ++r) {
      if (plan_.results[r] < 0) continue;
      reads(plan_.results[r]);
      expect(numel(plan_.result_shapes[r]) == numel(slot(plan_.results[r]).shape), "a result of another size than its slot");
    }
  }

 private:
  void expect(bool holds, const char* what) const {
    if (!holds) throw Unsound{std::string(what) + " (step " + std::to_string(at_) + ")"};
  }

  const Slot& slot(std::int32_t s) const {
    expect(s >= 0 && s < static_cast<std::int32_t>(plan_.slots.size()), "a slot that does not exist");
    return plan_.slots[s];
  }

  void reads(std::int32_t s) const {
    const Slot& source = slot(s);
    if (source.zero_filled || numel(source.shape) == 0) return;
    expect(written_[s], "a slot is read before it is written");
    expect(static_cast<std::size_t>(s) < plan_.given || stored_[s] == numel(source.shape),
           "a slot is read before all of it is stored");
  }

  // `places`: how many places are stored to; a slot that is not zero-filled has to be stored to once in each of them.
  void writes(std::int32_t s, std::int64_t places) {
    slot(s);
    expect(static_cast<std::size_t>(s) >= plan_.given, "a slot of the caller's is written");
    written_[s] = true;
    stored_[s] += places;
  }
  void makes(std::int32_t s, const Shape& shape) {
    expect(slot(s).shape == shape, "a step makes another shape than its slot has");
    writes(s, numel(shape));
  }

  void within(std::int32_t s, const std::vector<Affine>& axes, const Shape& extents) const {
    const Shape& shape = slot(s).shape;
    expect(axes.size() == shape.size(), "a coordinate is missing");
    for (const Affine& axis : axes) expect(axis.step.size() == extents.size(), "a coordinate over other loops");
    if (std::ranges::find(extents, 0) != extents.end()) return;
    for (std::size_t a = 0; a < shape.size(); ++a) {
      if (axes[a].lowest(extents) >= 0 && axes[a].highest(extents) < shape[a]) continue;
      throw Unsound{"slot " + std::to_string(s) + " is left along axis " + std::to_string(a) + " of size " +
                    std::to_string(shape[a]) + ", from " + std::to_string(axes[a].lowest(extents)) + " to " +
                    std::to_string(axes[a].highest(extents)) + " (step " + std::to_string(at_) + ")"};
    }
  }
  void reads(const Read& read, const Shape& extents) const {
    within(read.slot, read.axes, extents);
    reads(read.slot);
  }

  void check(const Evaluate& step) {
    const fused::Program& program = *step.program;
    expect(program.rank() == static_cast<int>(step.extents.size()), "a program over another number of loops");
    expect(program.operands() == static_cast<int>(step.operands.size()), "a program of another number of operands");
    expect(program.outputs().size() == step.targets.size(), "a program of another number of results");
    for (const Read& read : step.operands) reads(read, step.extents);
    for (std::size_t o = 0; o < step.targets.size(); ++o) {
      const Target& target = step.targets[o];
      const fused::OutputSpec& output = program.outputs()[o];
      within(target.slot, target.axes, step.extents);
      expect(output.dtype == slot(target.slot).dtype, "a result of another type than its slot");
      if (target.accumulate) reads(target.slot);
      std::int64_t places = 1;
      for (std::size_t k = 0; k < step.extents.size(); ++k) {
        const bool summed = output.reduced >> k & 1;
        if (!summed) places *= step.extents[k];
        for (const Affine& axis : target.axes) expect(!summed || !axis.moves(k), "a sum is stored along the loop it sums");
      }
      writes(target.slot, target.accumulate ? 0 : places);
    }
  }

  void check(const Matmul& step) {
    reads(step.a, step.extents);
    reads(step.b, step.extents);
    if (step.scale) reads(*step.scale, step.extents);
    std::vector<int> seen(step.extents.size(), 0);
    Shape shape;
    for (const auto* loops : {&step.batch, &step.m, &step.n, &step.k}) {
      for (std::size_t loop : *loops) {
        expect(loop < seen.size() && seen[loop]++ == 0, "a product lists a loop twice");
        if (loops != &step.k) shape.push_back(step.extents[loop]);
      }
    }
    for (std::size_t loop = 0; loop < seen.size(); ++loop) {
      expect(seen[loop] == 1 || (!step.a.moves(loop) && !step.b.moves(loop)), "a product leaves a loop out");
    }
    makes(step.out, shape);
  }

  void check(const Take& step) {
    reads(step.source);
    reads(step.index);
    Shape shape = slot(step.index).shape;
    if (step.axis) {
      expect(shape.size() == 1 && *step.axis < slot(step.source).shape.size(), "positions along an axis that does not exist");
      const std::int64_t count = shape[0];
      shape = slot(step.source).shape;
      shape[*step.axis] = count;
    }
    makes(step.out, shape);
  }

  void check(const PutAdd& step) {
    reads(step.value, step.extents);
    expect(slot(step.out).zero_filled, "additions to a slot that is not zero-filled");
    if (!step.puts_rows()) reads(step.index, step.extents);
    if (step.axis) {
      const IndexedAxis& along = *step.axis;
      const Shape& shape = slot(step.out).shape;
      expect(along.axis < shape.size() && along.loops.size() == shape.size(), "an indexed axis that does not exist");
      reads(along.index, step.extents);
      for (std::size_t a = 0; a < shape.size(); ++a) {
        std::int64_t extent = 1;
        for (std::size_t loop : along.loops[a]) {
          expect(loop < step.extents.size(), "a loop that does not exist");
          extent *= step.extents[loop];
        }
        expect(a == along.axis || extent <= shape[a], "additions beyond an axis");
      }
    }
    writes(step.out, 0);
  }

  void check(const Arange& step) {
    expect(slot(step.out).shape.size() == 1, "a range of several axes");
    makes(step.out, slot(step.out).shape);
  }

  void check(const CallNode& step) {
    const Shape* lead = nullptr;
    const auto leads = [&](std::int32_t s) {
      const Shape& shape = slot(s).shape;
      expect(shape.size() >= step.batch, "a called node's tensor without the batch axes");
      expect(lead == nullptr || std::equal(shape.begin(), shape.begin() + step.batch, lead->begin()),
             "a called node's tensors differ in the batch axes");
      lead = &shape;
    };
    for (std::int32_t s : step.cotangents) {
      if (s >= 0) leads(s), reads(s);
    }
    for (std::int32_t s : step.results) {
      if (s >= 0) leads(s), makes(s, slot(s).shape);
    }
  }

  const Plan& plan_;
  std::size_t at_ = 0;
  std::vector<std::int64_t> stored_;  // places stored to so far, per slot
  std::vector<bool> written_;
};

}  // namespace

std::string violation(const Plan& plan) {
  try {
    Verifier(plan).run();
  } catch (const Unsound& unsound) {
    return unsound.what;
  }
  return {};
}

}  // namespace wengert::blocks
