#include "accumulate/derivatives.h"

#include <c10/util/hash.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include "accumulate/calls.h"
#include "accumulate/execute.h"
#include "accumulate/history.h"
#include "accumulate/route.h"
#include "blocks/footprint.h"
#include "common/budget.h"
#include "common/fork_safe_mutex.h"
#include "common/lru.h"
#include "fused/footprint.h"
#include "kernels/cuda/compiler.h"
#include "ops/backend.h"
#include "ops/fused_autograd.h"
#include "ops/graph_stream.h"
#include "tape/custom.h"
#include "tape/pass.h"
#include "tape/streams.h"

namespace wengert::accumulate {

namespace {

std::atomic<std::int64_t> plan_hits{0}, plan_misses{0};
std::atomic<std::int64_t> launches_before{0};  // kernel launches up to the last reset

struct SignatureHash {
  std::size_t operator()(const common::Key& key) const {
    constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15ull;
    const auto mix = [](std::uint64_t& lane, std::int64_t word) { lane = (lane ^ static_cast<std::uint64_t>(word)) * kOdd; };
    std::uint64_t a = key.size(), b = 1, c = 2, d = 3;  // each in a register: a product has to wait for the one before
    const std::int64_t* word = key.data();
    const std::int64_t* const end = word + key.size();
    for (; end - word >= 4; word += 4) {
      mix(a, word[0]);
      mix(b, word[1]);
      mix(c, word[2]);
      mix(d, word[3]);
    }
    for (; word != end; ++word) mix(a, *word);
    std::uint64_t hash = 0;
    for (const std::uint64_t lane : {a, b, c, d}) hash = (hash ^ lane ^ (lane >> 32)) * kOdd;
    return hash ^ (hash >> 32);
  }
};

// What planning came to: a plan, or the Unsupported why there is none.
struct Planned {
  blocks::Plan plan;
  std::exception_ptr refusal;
  std::size_t structure = 0;         // hash of the key
  std::vector<GaveNothing> lessons;  // what the plan is made without
  HistoryMemo history;               // of the results
  HistoryMemo second;                // of the Hessian, where the results are the gradient
};

// By the structure they were made for.
class PlanCache {
 public:
  std::shared_ptr<const Planned> find(const common::Key& key) {
    std::lock_guard lock(mutex_);
    const auto* found = plans_.find(key);
    return found ? *found : nullptr;
  }
  // In the place of another that is there.
  void put(const common::Key& key, std::shared_ptr<const Planned> planned) {
    const std::size_t bytes = sizeof(key) + key.size() * sizeof(std::int64_t) + blocks::footprint(planned->plan);
    std::lock_guard lock(mutex_);
    plans_.erase(key);
    plans_.insert(key, std::move(planned), bytes);
  }
  std::size_t bytes() {
    std::lock_guard lock(mutex_);
    return plans_.bytes();
  }
  void clear() {
    std::lock_guard lock(mutex_);
    plans_.clear();
  }

 private:
  common::ForkSafeMutex mutex_;
  common::Lru<common::Key, std::shared_ptr<const Planned>, SignatureHash> plans_{common::plan_budget()};
};

thread_local std::size_t structures = 0;  // of the plans since the last `take_structures`

PlanCache& plan_cache() {
  static PlanCache* cache = new PlanCache;  // never destroyed: threads may outlive static destructors
  return *cache;
}
[[maybe_unused]] const PlanCache& made_at_load = plan_cache();  // see common::ForkSafeMutex

std::shared_ptr<Planned> plan_anew(const tape::Tape& tape, const Request& request, std::size_t structure) {
  auto planned = std::make_shared<Planned>();
  planned->structure = structure;
  try {
    planned->plan = make_plan(tape, request);
  } catch (const tape::Unsupported&) {
    planned->refusal = std::current_exception();
  } catch (const std::logic_error& error) {  // a nest of too many loops, a derivative without a formula
    planned->refusal = std::make_exception_ptr(tape::Unsupported(error.what()));
  }
  return planned;
}

// WENGERT_COMPARE_PLANS=1, for tests: a plan that is found again is made again, to see that its key says all of it.
const bool compares_hits = [] {
  const char* value = std::getenv("WENGERT_COMPARE_PLANS");
  return value != nullptr && std::strcmp(value, "1") == 0;
}();

void compare(const Planned& found, const Planned& made) {
  const auto text = [](const Planned& planned) {
    if (planned.refusal) return std::string("refused\n");
    std::string out = blocks::to_string(planned.plan);
    for (const blocks::Step& step : planned.plan.steps) {
      if (const auto* nest = std::get_if<blocks::Evaluate>(&step)) out += nest->text;
    }
    return out;
  };
  TORCH_CHECK(text(found) == text(made), "wengert: two structures share the key of one plan:\n", text(found), "and\n",
              text(made));
}

// Continues the tape's signature, which holds no device: plans differ by what devices can do.
std::shared_ptr<const Planned> plan_for(tape::Tape& tape, const Request& request, Mode mode, at::TensorList cotangents,
                                        const Edges& ends, Calls& calls) {
  common::Key& key = tape.signature;
  if (mode != Mode::plain) sign_edges(tape, ends, key);
  common::KeyPart asked(key, 6);
  asked.put(mode);
  asked.put(request.seed);
  asked.put(request.none_is_zero);
  asked.put(request.by_sample);
  asked.put(ops::can_launch(tape.device));
  asked.put(request.cotangents.size());
  for (const Cotangent& cotangent : request.cotangents) {
    common::KeyPart part(key, cotangent.given ? 2 + common::length_in_key(cotangent.shape) : 1);
    part.put(cotangent.given);
    if (!cotangent.given) continue;
    part.put(cotangent.dtype);
    part.put(cotangent.shape);
  }
  for (const at::Tensor& cotangent : cotangents) common::KeyPart(key, 1).put(cotangent.requires_grad());
  std::shared_ptr<const Planned> planned = plan_cache().find(key);
  ++(planned ? plan_hits : plan_misses);
  if (planned) calls.begin_with(planned->lessons);
  if (planned && compares_hits) compare(*planned, *plan_anew(tape, request, planned->structure));
  if (!planned) {
    planned = plan_anew(tape, request, SignatureHash{}(key));
    plan_cache().put(key, planned);
  }
  structures = structures * 31 + planned->structure;
  if (planned->refusal) std::rethrow_exception(planned->refusal);
  return planned;
}

// What our operations leave out of a history PyTorch's may lead to with the derivative zero, and custom Functions on the way may
// make something of zeros.  Throws Unsupported where there are such: PyTorch is not asked about histories with user code in them.
void check_left_out(const blocks::Plan& plan, const tape::Tape& tape, at::TensorList inputs) {
  std::vector<at::Tensor> left_out;
  for (const blocks::Step& step : plan.steps) {
    const auto* nest = std::get_if<blocks::Evaluate>(&step);
    if (nest == nullptr) continue;
    const auto effect = ops::effects(nest->program);
    for (std::size_t i = 0; i < nest->targets.size(); ++i) {
      for (const std::int32_t k : nest->program->pool().operands(nest->program->outputs()[i].expr)) {
        const std::int32_t slot = nest->operands[k].slot;
        if (slot >= std::ssize(tape.slots) || (*effect)[i * nest->operands.size() + k]) continue;
        if (tape.slots[slot].requires_grad()) left_out.push_back(tape.slots[slot]);
      }
    }
  }
  if (!left_out.empty() && tape::passes_custom(left_out, inputs)) {
    throw tape::Unsupported("a custom Function behind a derivative that is zero");
  }
}

struct Answer {
  std::vector<at::Tensor> results;
  std::shared_ptr<const Planned> planned;
  bool custom = false;  // user code took part, which is not asked twice
  // Where the results have a history:
  Edges ends;
  std::vector<std::int64_t> behind;
  std::size_t graph_bytes = 0;
  std::uint64_t forgotten = 0;  // questions, before they began
};

Answer run(tape::Tape& tape, const Request& request, at::TensorList inputs, at::TensorList cotangents, Mode mode,
           bool keep_graph) {
  Answer answer;
  answer.custom = tape.custom;
  if (mode != Mode::plain) {
    answer.forgotten = forgotten_questions();
    answer.ends = ends(tape, inputs, cotangents, answer.behind);
    answer.graph_bytes = graph_bytes(tape, answer.ends);
  }
  Calls calls(tape);
  answer.planned = plan_for(tape, request, mode, cotangents, answer.ends, calls);
  const Strides strides = request.seed == Seed::gradient ? Strides::dense : Strides::contiguous;
  const auto again = [&] {  // for what the signature cannot know
    const std::shared_ptr<Planned> planned = plan_anew(tape, request, answer.planned->structure);
    answer.planned = planned;
    if (planned->refusal) std::rethrow_exception(planned->refusal);
    if (auto lessons = calls.lessons(planned->plan)) {
      planned->lessons = *std::move(lessons);
      plan_cache().put(tape.signature, planned);
    }
  };
  if (tape.custom && mode != Mode::plain) check_left_out(answer.planned->plan, tape, inputs);
  const auto run_plan = [&] {
    for (;;) {
      const blocks::Plan& plan = answer.planned->plan;
      try {
        answer.results = mode == Mode::plain ? execute(plan, tape, cotangents, strides, calls)
                                             : execute_differentiably(plan, tape, cotangents, strides, calls);
        return;
      } catch (const GaveNothing& call) {
        calls.disconnect(call);
      } catch (const GaveSomething&) {
        calls.forget();
      }
      again();
    }
  };
  try {
    if (tape.custom) {
      tape::in_own_pass(keep_graph, run_plan);
    } else {
      run_plan();
    }
    return answer;
  } catch (const kernels::cuda::KernelUnavailable& error) {
    TORCH_WARN_ONCE("wengert lacks a CUDA kernel and leaves the work to PyTorch. ", error.what());
    throw tape::Unsupported("a CUDA kernel that cannot be compiled, loaded or launched");
  }
}

// Saved tensors have to keep their history exactly when the results are to be differentiable.  Where terms of second derivatives
// cancel, half precision leaves what was rounded on the way: PyTorch's order of things loses less there.
tape::Tape capture(at::TensorList outputs, at::TensorList inputs, bool create_graph, bool one_row) {
  const auto is_half = [](const at::Tensor& tensor) { return at::isReducedFloatingType(tensor.scalar_type()); };
  if (create_graph && (std::ranges::any_of(outputs, is_half) || std::ranges::any_of(inputs, is_half))) {
    throw tape::Unsupported("second derivatives in half precision");
  }
  torch::autograd::AutoGradMode mode(create_graph);
  tape::Tape tape = tape::capture(outputs, inputs, one_row);
  if (!ops::can_evaluate(tape.device.type())) throw tape::Unsupported("a device that this build has no kernels for");
  return tape;
}

TensorRows rows(std::vector<at::Tensor> flat, std::size_t width) {
  TensorRows out;
  for (std::size_t i = 0; i < flat.size(); i += width) {
    out.emplace_back(std::make_move_iterator(flat.begin() + i), std::make_move_iterator(flat.begin() + i + width));
  }
  return out;
}

Answer jacobians(Seed seed, at::TensorList outputs, at::TensorList inputs, Mode mode, bool none_is_zero, bool by_sample = false) {
  const bool one_row = std::ranges::all_of(outputs, [](const at::Tensor& output) { return output.numel() <= 1; });
  tape::Tape tape = capture(outputs, inputs, mode != Mode::plain, one_row);
  const Request request{.seed = seed, .cotangents = {}, .none_is_zero = none_is_zero, .by_sample = by_sample};
  return run(tape, request, inputs, {}, mode, /*keep_graph=*/true);
}

// With the history that PyTorch's results have.
struct Asked {
  Question::Of of;
  at::TensorList outputs, inputs, cotangents;
};

std::vector<tape::Shape> shapes_of(at::TensorList tensors) {
  std::vector<tape::Shape> out;
  for (const at::Tensor& tensor : tensors) out.push_back(tensor.sizes().vec());
  return out;
}

// Rows that PyTorch takes at once, below vmap, are not what it tells of one.
Route route_for(Question::Of of, at::TensorList outputs, at::TensorList inputs, Mode mode) {
  const bool one_by_one = mode == Mode::differentiable && of != Question::Of::batched_gradient;
  return one_by_one ? Route(static_cast<int>(of), outputs, inputs) : Route();
}

// Of each result's rows PyTorch has made the first.
std::vector<Route::Row> rows_of(const Counterparts& theirs, std::size_t width, const std::vector<tape::Shape>& rows) {
  std::vector<Route::Row> out;
  for (std::size_t first = 0; first < theirs.size(); first += width) {
    out.push_back({.tensors = {}, .times = rows.empty() ? 1 : static_cast<double>(blocks::numel(rows[first / width]))});
    for (std::size_t j = 0; j < width; ++j) {
      out.back().tensors.insert(out.back().tensors.end(), theirs[first + j].begin(), theirs[first + j].end());
    }
  }
  return out;
}

void complete(Answer& answer, Mode mode, const HistoryMemo& memo, const Asked& asked, const std::vector<tape::Shape>& rows,
              const Route& route = Route()) {
  if (mode == Mode::plain) return;
  std::shared_ptr<Question> question;
  if (!answer.custom) {
    question = std::make_shared<Question>();
    question->of = asked.of;
    question->at_once = mode == Mode::at_once;
    question->outputs = edges_of(asked.outputs);
    question->inputs = edges_of(asked.inputs);
    std::ranges::transform(asked.cotangents, std::back_inserter(question->cotangents), Question::Cotangent::of);
    question->ends = answer.ends;
    question->behind = answer.behind;
  }
  const auto find = [&] {
    const std::size_t width = mode == Mode::at_once ? asked.inputs.size() : answer.results.size();
    const Counterparts theirs = question ? counterparts(*question) : own_columns(answer.results, width);
    if (question) route.choose(answer.results, rows_of(theirs, asked.inputs.size(), rows));
    return std::make_unique<History>(answer.ends, theirs, answer.results, question != nullptr);
  };
  const auto lasts = [&] { return forgotten_questions() == answer.forgotten; };  // or else it may depend on one of those
  memo.use(find, lasts, [&](const History& history) {
    std::shared_ptr<const Provenance> provenance;
    if (question) provenance = std::make_shared<const Provenance>(memo.structure(), question, answer.graph_bytes);
    history.apply(answer.results, answer.ends, rows, asked.inputs, provenance);
  });
}

// See NOTE [Streams].
ops::GraphStream stream_of(at::TensorList outputs, at::TensorList inputs) {
  ops::GraphStream stream;
  if (const auto foreign = tape::foreign_stream(outputs, inputs)) stream.enter(*foreign);
  return stream;
}

// Every tensor has its samples along the first axis, and as many of them.
bool same_batch(at::TensorList outputs, at::TensorList inputs) {
  if (outputs.empty() || outputs[0].dim() == 0) return false;
  const auto fits = [batch = outputs[0].size(0)](const at::Tensor& tensor) { return tensor.dim() && tensor.size(0) == batch; };
  return std::ranges::all_of(outputs, fits) && std::ranges::all_of(inputs, fits);
}

}  // namespace

TensorRows jacobian(at::TensorList outputs, at::TensorList inputs, Mode mode, bool none_is_zero, bool by_sample) {
  const ops::GraphStream stream = stream_of(outputs, inputs);
  const Route route = route_for(Question::Of::jacobian, outputs, inputs, mode);
  route.follow();
  Answer answer = jacobians(Seed::jacobian, outputs, inputs, mode, none_is_zero, by_sample);
  complete(answer, mode, answer.planned->history, {Question::Of::jacobian, outputs, inputs, {}}, shapes_of(outputs), route);
  stream.returned(answer.results);
  return rows(std::move(answer.results), inputs.size());
}

TensorRows batch_jacobian(at::TensorList outputs, at::TensorList inputs, Mode mode, bool check) {
  if (!same_batch(outputs, inputs)) throw tape::Unsupported("tensors without a common batch axis in front");
  const ops::GraphStream stream = stream_of(outputs, inputs);
  Answer answer = jacobians(check ? Seed::batch_tied : Seed::batch_summed, outputs, inputs, mode, true);
  complete(answer, mode, answer.planned->history, {Question::Of::jacobian, outputs, inputs, {}}, {});
  stream.returned(answer.results);
  return rows(std::move(answer.results), inputs.size());
}

namespace {

// Of batched cotangents; where they have another axis in front each, or none, PyTorch has something to say.
void check_batch(at::TensorList outputs, const std::vector<at::Tensor>& cotangents) {
  bool fits = !cotangents.empty() && cotangents.size() == outputs.size();
  for (std::size_t i = 0; fits && i < cotangents.size(); ++i) {
    const at::IntArrayRef shape = cotangents[i].sizes();
    fits = shape.size() == outputs[i].sizes().size() + 1 && shape.slice(1) == outputs[i].sizes() &&
           shape[0] == cotangents[0].size(0);
  }
  if (!fits) throw tape::Unsupported("grad_outputs without a common batch axis in front");
}

// With `history`, as PyTorch's; without it, as it comes.
Answer gradients(at::TensorList outputs, at::TensorList inputs, at::TensorList cotangents, bool retain_graph, Mode mode,
                 bool batched, bool none_is_zero, bool history, bool asked = true) {
  const auto of = batched ? Question::Of::batched_gradient : Question::Of::gradient;
  const Route route = history ? route_for(of, outputs, inputs, mode) : Route();
  if (!asked) route.follow();
  tape::Tape tape = capture(outputs, inputs, mode != Mode::plain, !batched);
  Request request{.seed = batched ? Seed::batched_gradient : Seed::gradient, .cotangents = {}, .none_is_zero = none_is_zero};
  std::vector<at::Tensor> given;
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    const bool has = i < cotangents.size() && cotangents[i].defined();
    Cotangent cotangent{.given = has, .shape = {}, .dtype = at::kFloat};
    if (has) {
      const at::Tensor& tensor = cotangents[i];
      tape::check_tensor(tensor);
      if (tensor.device() != tape.device) throw tape::Unsupported("grad_outputs on another device than the outputs");
      cotangent.shape = tensor.sizes().vec();
      cotangent.dtype = tensor.scalar_type();
      given.push_back(tensor);
    }
    request.cotangents.push_back(std::move(cotangent));
  }
  if (batched) check_batch(outputs, given);
  Answer answer = run(tape, request, inputs, given, mode, retain_graph || batched);
  if (history) {
    const tape::Shape lead = batched && !given.empty() ? tape::Shape{given[0].size(0)} : tape::Shape();
    complete(answer, mode, answer.planned->history, {of, outputs, inputs, cotangents}, {lead}, route);
  }
  if (!retain_graph) tape::release(tape);
  return answer;
}

}  // namespace

std::vector<at::Tensor> gradient(at::TensorList outputs, at::TensorList inputs, at::TensorList cotangents, bool retain_graph,
                                 Mode mode, bool batched, bool none_is_zero, bool asked) {
  const ops::GraphStream stream = stream_of(outputs, inputs);
  stream.given(cotangents);
  std::vector<at::Tensor> results =
      gradients(outputs, inputs, cotangents, retain_graph, mode, batched, none_is_zero, true, asked).results;
  stream.returned(results);
  return results;
}

bool is_shorter_in_pytorch(at::TensorList outputs, at::TensorList inputs) {
  return route_for(Question::Of::gradient, outputs, inputs, Mode::differentiable).is_shorter_there();
}

TensorRows hessian(const at::Tensor& output, at::TensorList inputs, Mode mode) {
  const ops::GraphStream stream = stream_of({output}, inputs);
  const Route route = route_for(Question::Of::hessian, output, inputs, mode);
  route.follow();
  const Mode first = mode == Mode::plain ? Mode::differentiable : mode;
  Answer answer = gradients({output}, inputs, {}, true, first, false, true, false);
  std::vector<at::Tensor> connected;
  for (const at::Tensor& g : answer.results) {
    if (g.defined() && g.requires_grad()) connected.push_back(g);
  }
  std::vector<at::Tensor> second;
  if (!connected.empty()) second = jacobians(Seed::jacobian, connected, inputs, mode, true).results;
  auto row = second.begin();
  std::vector<at::Tensor> blocks;
  for (const at::Tensor& g : answer.results) {
    if (g.defined() && g.requires_grad()) {
      blocks.insert(blocks.end(), row, row + std::ssize(inputs));
      row += std::ssize(inputs);
    } else {
      blocks.resize(blocks.size() + inputs.size());
    }
  }
  answer.results = std::move(blocks);
  complete(answer, mode, answer.planned->second, {Question::Of::hessian, output, inputs, {}}, shapes_of(inputs), route);
  stream.returned(answer.results);
  return rows(std::move(answer.results), inputs.size());
}

blocks::Plan jacobian_plan(at::TensorList outputs, at::TensorList inputs) {
  return make_plan(capture(outputs, inputs, false, false), {.seed = Seed::jacobian, .cotangents = {}});
}

std::string plan_text(at::TensorList outputs, at::TensorList inputs, Seed seed) {
  Request request{.seed = seed, .cotangents = {}};
  if (seed == Seed::gradient) request.cotangents.resize(outputs.size());
  return blocks::to_string(make_plan(capture(outputs, inputs, false, seed == Seed::gradient), request));
}

Report explain(at::TensorList outputs, at::TensorList inputs) {
  const ops::GraphStream stream = stream_of(outputs, inputs);
  const tape::Tape tape = capture(outputs, inputs, false, false);
  Report report;
  make_plan(tape, {.seed = Seed::jacobian, .cotangents = {}}, &report);
  return report;
}

std::size_t take_structures() { return std::exchange(structures, 0); }

std::map<std::string, std::int64_t> counters() {
  const StepCounts steps = step_counts();
  const Totals structure = totals();
  return {{"plan_hits", plan_hits},     {"plan_misses", plan_misses},      {"launches", ops::launch_count() - launches_before},
          {"matmuls", steps.matmuls},   {"node_calls", steps.node_calls},  {"takes", steps.takes},
          {"blocks", structure.blocks}, {"densified", structure.densified}};
}

std::map<std::string, std::int64_t> cache_bytes() {
  return {{"plans", plan_cache().bytes()},
          {"ways", route_bytes()},
          {"programs", fused::interned_bytes()},
          {"derived programs", ops::derived_bytes()},
          {"kernels", ops::kernel_bytes()}};
}

void clear_caches() {
  plan_cache().clear();
  forget_routes();
  forget_questions();
  fused::forget_interned();
  ops::forget_derived();
  ops::clear_kernels();
}

void reset_counters() {
  plan_hits = plan_misses = 0;
  launches_before = ops::launch_count();
  reset_step_counts();
  reset_totals();
}

}  // namespace wengert::accumulate
