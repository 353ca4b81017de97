#include "fused/program.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "common/budget.h"
#include "common/fork_safe_mutex.h"
#include "common/lru.h"
#include "fused/footprint.h"

namespace wengert::fused {
namespace {

struct DtypeInfo {
  const char* name;
  int bytes;
};
constexpr DtypeInfo kDtypes[kDtypeCount] = {{"f32", 4}, {"f64", 8}, {"bf16", 2}, {"f16", 2}, {"i64", 8},
                                            {"i32", 4}, {"i16", 2}, {"i8", 1},   {"u8", 1},  {"b8", 1}};

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("wengert::fused program: " + what); }

void check(const ProgramSpec& spec) {
  if (spec.rank < 0 || spec.rank > kMaxRank)
    fail("rank " + std::to_string(spec.rank) + " is not in 0.." + std::to_string(kMaxRank));
  if (spec.operands < 0) fail("operands=" + std::to_string(spec.operands) + " is negative");
  if (spec.compute != Dtype::f32 && spec.compute != Dtype::f64) fail("compute type must be f32 or f64");
  if (spec.outputs.empty()) fail("no outputs");
  for (const OutputSpec& output : spec.outputs) {
    if (spec.rank < 32 && output.reduced >> spec.rank) fail("an output sums over an axis the nest does not have");
  }
}

std::vector<ExprId> roots_of(const ProgramSpec& spec) {
  std::vector<ExprId> roots;
  for (const OutputSpec& output : spec.outputs) roots.push_back(output.expr);
  return roots;
}

// Slots that computing each value takes, were it a tree (Sethi and Ullman, "The generation of optimal code for arithmetic
// expressions"): its arguments in order of their own, largest first.
std::vector<std::int32_t> slots_needed(const ExprPool& pool, const std::vector<ExprId>& roots) {
  const std::vector<ExprId> below = pool.reachable(roots);  // arguments before users
  std::vector<std::int32_t> needed(below.empty() ? 0 : below.back() + 1, 0);
  for (ExprId id : below) {
    std::array<std::int32_t, kMaxArity> each{};
    std::span<const ExprId> args = pool.args(id);
    std::transform(args.begin(), args.end(), each.begin(), [&](ExprId arg) { return needed[arg]; });
    std::sort(each.begin(), each.begin() + args.size(), std::greater<>());
    if (!args.empty()) needed[id] = 1;
    for (std::size_t k = 0; k < args.size(); ++k) {
      if (each[k] > 0) needed[id] = std::max(needed[id], each[k] + static_cast<std::int32_t>(k));
    }
  }
  return needed;
}

// Depth first from the outputs, arguments before users, those that take more slots first: keeps live ranges short.
std::vector<ExprId> schedule(const ExprPool& pool, const ProgramSpec& spec) {
  const std::vector<ExprId> roots = roots_of(spec);
  const std::vector<std::int32_t> needed = slots_needed(pool, roots);
  std::vector<ExprId> order;
  std::vector<char> state(needed.size());  // 0 unseen, 1 arguments pushed, 2 emitted
  std::vector<ExprId> stack;
  for (ExprId root : roots) {
    stack.push_back(root);
    while (!stack.empty()) {
      const ExprId id = stack.back();
      if (state[id] != 0) {
        stack.pop_back();
        if (state[id] == 1) {
          state[id] = 2;
          order.push_back(id);
        }
        continue;
      }
      state[id] = 1;
      const std::size_t first = stack.size();
      for (ExprId arg : pool.args(id)) {
        if (state[arg] == 0) stack.push_back(arg);
      }
      // The last one is taken first.
      std::reverse(stack.begin() + first, stack.end());
      std::stable_sort(stack.begin() + first, stack.end(), [&](ExprId a, ExprId b) { return needed[a] < needed[b]; });
    }
  }
  return order;
}

// x^p for the exponents that ATen's pow kernels treat specially.
ExprId special_power(ExprPool& pool, ExprId base, double exponent) {
  const auto unary = [&](Prim prim, ExprId arg) { return pool.apply(prim, {&arg, 1}); };
  if (exponent == 0.5) return unary(Prim::sqrt, base);
  if (exponent == -0.5) return unary(Prim::rsqrt, base);
  if (exponent == -1) return unary(Prim::reciprocal, base);
  if (exponent == -2) return unary(Prim::reciprocal, unary(Prim::square, base));
  if (exponent != 3) return kNone;
  const ExprId factors[] = {unary(Prim::square, base), base};
  return pool.apply(Prim::mul, factors);
}

Bytecode compile(const ExprPool& pool, const ProgramSpec& spec) {
  Bytecode code;
  std::vector<ExprId> order = schedule(pool, spec);
  std::unordered_map<ExprId, Register> registers;
  std::unordered_map<ExprId, int> uses;
  std::vector<std::pair<std::int32_t, ExprId>> leaves;
  for (ExprId id : order) {
    std::int32_t index;
    if (pool.is_operand(id, &index)) {
      if (index < 0 || index >= spec.operands) fail("operand a" + std::to_string(index) + " is out of range");
      leaves.emplace_back(index, id);
    }
    for (ExprId arg : pool.args(id)) ++uses[arg];
  }
  for (const OutputSpec& output : spec.outputs) ++uses[output.expr];  // never released: outputs are read at the end of a tile
  std::sort(leaves.begin(), leaves.end());
  for (auto [index, id] : leaves) {
    registers[id] = static_cast<Register>(code.loads.size());
    code.loads.push_back(index);
  }
  for (ExprId id : order) {
    double value;
    if (!pool.is_constant(id, &value)) continue;
    registers[id] = static_cast<Register>(code.loads.size() + code.constants.size());
    code.constants.push_back(value);
  }
  const std::size_t first_slot = code.loads.size() + code.constants.size();
  std::vector<Register> free_slots;
  for (ExprId id : order) {
    if (pool.is_constant(id) || pool.is_operand(id)) continue;
    std::span<const ExprId> args = pool.args(id);
    Instruction instruction{pool.prim(id), 0, {}};
    for (std::size_t k = 0; k < args.size(); ++k) instruction.args[k] = registers[args[k]];
    // The result's slot is taken before the arguments' are released: an argument may be a single vector that is read again for
    // every vector of the result.
    if (free_slots.empty()) free_slots.push_back(static_cast<Register>(first_slot + code.slots++));
    instruction.result = free_slots.back();
    free_slots.pop_back();
    for (std::size_t k = 0; k < args.size(); ++k) {
      if (--uses[args[k]] == 0 && registers[args[k]] >= first_slot) free_slots.push_back(registers[args[k]]);
    }
    registers[id] = instruction.result;
    code.instructions.push_back(instruction);
  }
  for (const OutputSpec& output : spec.outputs) code.outputs.push_back(registers[output.expr]);
  return code;
}

// The code of a program with powers.  Its text keeps them: PyTorch's derivative of x^-1 is -x^-2, which at 0 and infinity is not
// that of the quotient the code computes.
Bytecode compile_with_powers(const ExprPool& pool, ProgramSpec spec) {
  const std::vector<ExprId> order = pool.reachable(roots_of(spec));
  const auto is_power = [&](ExprId id) { return !pool.args(id).empty() && pool.prim(id) == Prim::pow; };
  if (std::none_of(order.begin(), order.end(), is_power)) return compile(pool, spec);
  ExprPool expanded;
  std::vector<ExprId> image(order.back() + 1, kZero);
  for (const ExprId id : order) {
    double value = 0;
    std::int32_t index = 0;
    if (id == kZero) continue;
    if (pool.is_constant(id, &value)) {
      image[id] = expanded.constant(value);
    } else if (pool.is_operand(id, &index)) {
      image[id] = expanded.operand(index);
    } else {
      const std::span<const ExprId> given = pool.args(id);
      ExprId args[kMaxArity];
      std::transform(given.begin(), given.end(), args, [&](ExprId arg) { return image[arg]; });
      image[id] = is_power(id) && pool.is_constant(given[1], &value) ? special_power(expanded, args[0], value) : kNone;
      if (image[id] == kNone) image[id] = expanded.apply(pool.prim(id), {args, given.size()});
    }
  }
  for (OutputSpec& output : spec.outputs) output.expr = image[output.expr];
  return compile(expanded, spec);
}

void append_number(std::string& text, double value) {
  char buffer[40];
  auto [end, error] = std::to_chars(buffer, buffer + sizeof buffer, value);
  text.append(buffer, end);
}

// ------------------------------------------------------------------------------------------------------------------- parsing
std::string quote(std::string_view token) { return "'" + std::string(token) + "'"; }

// Splits off the next token of a line.
std::string_view next_token(std::string_view& line) {
  std::size_t begin = line.find_first_not_of(' ');
  if (begin == std::string_view::npos) return line = {};
  std::size_t end = std::min(line.find(' ', begin), line.size());
  std::string_view token = line.substr(begin, end - begin);
  line.remove_prefix(end);
  return token;
}

template <class Number>
Number parse_number(std::string_view token, const char* what) {
  Number value{};
  auto [end, error] = std::from_chars(token.data(), token.data() + token.size(), value);
  if (error != std::errc{} || end != token.data() + token.size() || token.empty())
    fail(std::string("bad ") + what + " " + quote(token));
  return value;
}

int parse_field(std::string_view& line, std::string_view key) {
  std::string_view token = next_token(line);
  if (!token.starts_with(key)) fail("expected " + std::string(key) + "..., found " + quote(token));
  return parse_number<int>(token.substr(key.size()), "number");
}

Dtype parse_dtype(std::string_view token) {
  for (int i = 0; i < kDtypeCount; ++i) {
    if (token == kDtypes[i].name) return static_cast<Dtype>(i);
  }
  fail("unknown dtype " + quote(token));
}

struct Parser {
  ExprPool pool;
  ProgramSpec spec;
  std::vector<ExprId> values;  // t0, t1, ...

  ExprId reference(std::string_view token) {
    if (token == "zero") return kZero;
    if (token.starts_with('a')) {
      int index = parse_number<int>(token.substr(1), "operand");
      if (index < 0 || index >= spec.operands) fail("operand " + quote(token) + " is out of range");
      return pool.operand(index);
    }
    if (token.starts_with('t')) {
      int index = parse_number<int>(token.substr(1), "value");
      if (index < 0 || static_cast<std::size_t>(index) >= values.size()) fail(quote(token) + " is used before it is defined");
      return values[index];
    }
    return pool.constant(parse_number<double>(token, "value"));
  }

  void header(std::string_view line) {
    if (next_token(line) != "fused" || next_token(line) != "v1") fail("the text does not start with 'fused v1'");
    spec.rank = parse_field(line, "rank=");
    spec.operands = parse_field(line, "operands=");
    std::string_view compute = next_token(line);
    if (!compute.starts_with("compute=")) fail("expected compute=..., found " + quote(compute));
    spec.compute = parse_dtype(compute.substr(8));
    if (!next_token(line).empty()) fail("trailing text in the first line");
  }

  void output(std::string_view line) {
    OutputSpec out{};
    out.expr = reference(next_token(line));
    out.dtype = parse_dtype(next_token(line));
    std::string_view sum = next_token(line);
    if (!sum.empty()) {
      if (!sum.starts_with("sum=")) fail("expected sum=..., found " + quote(sum));
      sum.remove_prefix(4);
      while (true) {
        std::size_t comma = std::min(sum.find(','), sum.size());
        int axis = parse_number<int>(sum.substr(0, comma), "axis");
        if (axis < 0 || axis >= spec.rank) fail("axis " + std::to_string(axis) + " is out of range");
        out.reduced |= std::uint32_t{1} << axis;
        if (comma == sum.size()) break;
        sum.remove_prefix(comma + 1);
      }
    }
    if (!next_token(line).empty()) fail("trailing text after an output");
    spec.outputs.push_back(out);
  }

  void value(std::string_view name, std::string_view line) {
    if (name != "t" + std::to_string(values.size()))
      fail("expected t" + std::to_string(values.size()) + " or out, found " + quote(name));
    if (next_token(line) != "=") fail("expected '=' after " + quote(name));
    std::string_view op = next_token(line);
    Prim prim;
    if (!find_prim(op, &prim)) fail("unknown primitive " + quote(op));
    ExprId args[kMaxArity];
    int count = 0;
    for (std::string_view token = next_token(line); !token.empty(); token = next_token(line)) {
      if (count == info(prim).arity) fail("too many arguments for " + quote(op));
      args[count++] = reference(token);
    }
    if (count != info(prim).arity) fail("too few arguments for " + quote(op));
    values.push_back(pool.apply(prim, {args, static_cast<std::size_t>(count)}));
  }

  std::shared_ptr<const Program> parse(std::string_view text) {
    bool first = true;
    while (!text.empty()) {
      std::size_t end = std::min(text.find('\n'), text.size());
      std::string_view line = text.substr(0, end);
      text.remove_prefix(std::min(end + 1, text.size()));
      if (first) {
        header(line);
        check({.rank = spec.rank, .operands = spec.operands, .compute = spec.compute, .outputs = {OutputSpec{}}});
        first = false;
        continue;
      }
      std::string_view rest = line;
      std::string_view head = next_token(rest);
      if (head.empty()) continue;
      if (head == "out") {
        output(rest);
      } else {
        value(head, rest);
      }
    }
    if (first) fail("empty text");
    return std::make_shared<const Program>(std::move(pool), std::move(spec));
  }
};

// ---------------------------------------------------------------------------------------------------------------------- cache
struct Cache {
  common::ForkSafeMutex mutex;
  common::Lru<std::string, std::shared_ptr<const Program>> programs{common::program_budget()};
};

Cache& cache() {
  static Cache* instance = new Cache;  // never destroyed: threads may outlive static destructors
  return *instance;
}
[[maybe_unused]] const Cache& made_at_load = cache();  // see common::ForkSafeMutex

}  // namespace

const char* name(Dtype dtype) { return kDtypes[static_cast<int>(dtype)].name; }
int size_in_bytes(Dtype dtype) { return kDtypes[static_cast<int>(dtype)].bytes; }

Program::Program(ExprPool pool, ProgramSpec spec) : pool_(std::move(pool)), spec_(std::move(spec)) {
  check(spec_);
  bytecode_ = compile_with_powers(pool_, spec_);
  text_ = to_text(pool_, spec_);
  static std::atomic<std::uint64_t> made{0};
  id_ = ++made;
}

std::string Program::text_with_leading_axes(int count) const {
  ProgramSpec spec = spec_;
  spec.rank += count;
  if (spec.rank > kMaxRank) fail("rank " + std::to_string(spec.rank) + " is not in 0.." + std::to_string(kMaxRank));
  for (OutputSpec& output : spec.outputs) output.reduced <<= count;
  return to_text(pool_, spec);
}

std::string to_text(const ExprPool& pool, const ProgramSpec& spec) {
  std::string text = "fused v1 rank=" + std::to_string(spec.rank) + " operands=" + std::to_string(spec.operands) +
                     " compute=" + name(spec.compute) + "\n";
  std::vector<ExprId> order = schedule(pool, spec);
  std::vector<int> numbers(order.empty() ? 0 : *std::max_element(order.begin(), order.end()) + 1, -1);
  auto append = [&](ExprId id) {
    double value;
    std::int32_t index;
    if (id == kZero) {
      text += "zero";
    } else if (pool.is_constant(id, &value)) {
      append_number(text, value);
    } else if (pool.is_operand(id, &index)) {
      text += 'a';
      text += std::to_string(index);
    } else {
      text += 't';
      text += std::to_string(numbers[id]);
    }
  };
  int count = 0;
  for (ExprId id : order) {
    if (pool.is_constant(id) || pool.is_operand(id)) continue;
    numbers[id] = count++;
    append(id);
    text += " = ";
    text += info(pool.prim(id)).name;
    for (ExprId arg : pool.args(id)) {
      text += ' ';
      append(arg);
    }
    text += '\n';
  }
  for (const OutputSpec& output : spec.outputs) {
    text += "out ";
    append(output.expr);
    text += ' ';
    text += name(output.dtype);
    const char* separator = " sum=";
    for (int axis = 0; axis < spec.rank; ++axis) {
      if (!(output.reduced >> axis & 1)) continue;
      text += separator;
      text += std::to_string(axis);
      separator = ",";
    }
    text += '\n';
  }
  return text;
}

std::shared_ptr<const Program> intern(std::string_view text) {
  Cache& c = cache();
  std::string key(text);
  {
    std::lock_guard lock(c.mutex);
    if (const auto* found = c.programs.find(key)) return *found;
  }
  std::shared_ptr<const Program> program = Parser{}.parse(text);
  const std::size_t bytes = sizeof key + key.capacity() + footprint(*program);
  std::lock_guard lock(c.mutex);
  return c.programs.insert(std::move(key), std::move(program), bytes);
}

std::size_t interned_bytes() {
  std::lock_guard lock(cache().mutex);
  return cache().programs.bytes();
}

void forget_interned() {
  std::lock_guard lock(cache().mutex);
  cache().programs.clear();
}

}  // namespace wengert::fused
