#include "fused/cuda_source.h"

#include <array>
#include <charconv>
#include <cmath>

namespace wengert::fused {
namespace {

const char* storage_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
      return "float";
    case Dtype::f64:
      return "double";
    case Dtype::bf16:
      return "Bf16";
    case Dtype::f16:
      return "F16";
    case Dtype::i64:
      return "std::int64_t";
    case Dtype::i32:
      return "std::int32_t";
    case Dtype::i16:
      return "std::int16_t";
    case Dtype::i8:
      return "std::int8_t";
    case Dtype::u8:
      return "std::uint8_t";
    case Dtype::b8:
      return "Bool";
  }
  __builtin_unreachable();
}

const char* boolean(bool value) { return value ? "true" : "false"; }

// A literal that reads back as the same double.
std::string literal(double value) {
  if (std::isnan(value)) return "prim::kNan";
  if (std::isinf(value)) return value < 0 ? "-prim::kInfinity" : "prim::kInfinity";
  char buffer[40];
  auto [end, error] = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::hex);
  std::string digits(buffer, end);
  const bool negative = digits[0] == '-';
  if (negative) digits.erase(0, 1);
  return std::string(negative ? "-" : "") + "0x" + digits;
}

// Primitives whose code is many instructions.
bool is_long(Prim prim) {
  switch (prim) {
    case Prim::add:
    case Prim::sub:
    case Prim::mul:
    case Prim::maximum:
    case Prim::minimum:
    case Prim::fmax:
    case Prim::fmin:
    case Prim::copysign:
    case Prim::heaviside:
    case Prim::lt:
    case Prim::le:
    case Prim::gt:
    case Prim::ge:
    case Prim::eq:
    case Prim::ne:
    case Prim::logical_and:
    case Prim::logical_or:
    case Prim::neg:
    case Prim::abs:
    case Prim::sign:
    case Prim::square:
    case Prim::relu:
    case Prim::relu6:
    case Prim::hardsigmoid:
    case Prim::hardswish:
    case Prim::floor:
    case Prim::ceil:
    case Prim::round:
    case Prim::trunc:
    case Prim::logical_not:
    case Prim::isnan:
    case Prim::where:
    case Prim::clamp:
    case Prim::hardtanh:
    case Prim::leaky_relu:
      return false;
    default:
      return true;
  }
}

class Emitter {
 public:
  Emitter(const Program& program, const KernelShape& shape) : code_(program.bytecode()), program_(program), shape_(shape) {}

  std::string emit() {
    const bool sums = shape_.variant != KernelShape::Variant::map;
    line("#include \"fused/nest_kernel.h\"");
    line("using namespace wengert::fused;");
    line("struct Nest {");
    line(std::string("  using Compute = ") + (program_.compute() == Dtype::f64 ? "double" : "float") + ";");
    line(std::string("  using Index = ") + (shape_.wide_index ? "std::int64_t" : "std::int32_t") + ";");
    constant("kLoads", std::max<std::size_t>(1, shape_.loads.size()));
    constant("kOutputs", shape_.stores.size());
    constant("kRank", shape_.rank);
    constant("kSums", shape_.sums);
    if (sums) constant("kReducedRank", shape_.reduced_rank);
    constant("kWidth", shape_.width);
    constant("kUnroll", shape_.unroll);
    line(std::string("  static constexpr bool kTail = ") + boolean(shape_.tail) + ";");
    line(std::string("  static constexpr bool kStreamed = ") + boolean(shape_.streamed) + ";");
    find_called();
    if (shape_.streamed) {
      stream();
    } else {
      load();
      evaluate();
    }
    store_elements();
    if (sums) store_sums();
    line("};");
    const char* parameters = sums ? "SumParameters" : "MapParameters";
    line(std::string("extern \"C\" __global__ void __launch_bounds__(kBlockThreads) ") + (sums ? kSumEntry : kMapEntry) +
         "(const __grid_constant__ " + parameters + "<Nest> p) {");
    if (sums) {
      line(std::string("  sum<Nest, ") + boolean(shape_.variant == KernelShape::Variant::sum_rows) + ">(p);");
    } else {
      line(shape_.streamed ? "  map_streamed<Nest>(p);" : "  map<Nest>(p);");
    }
    line("}");
    return std::move(text_);
  }

 private:
  void line(const std::string& text) { (text_ += text) += '\n'; }
  void constant(const char* name, std::size_t value) {
    line(std::string("  static constexpr int ") + name + " = " + std::to_string(value) + ";");
  }

  void load() {
    line(
        "  WENGERT_DEVICE static void load(Compute (&in)[kWidth][kLoads], const void* const* bases, const Index* offsets, int "
        "count) {");
    for (std::size_t i = 0; i < shape_.loads.size(); ++i) {
      const std::string k = std::to_string(i);
      if (shape_.loads[i].immediate) {
        line(std::string("    load_immediate<") + storage_type(shape_.loads[i].dtype) + ">(in, " + k + ", bases + " + k + ");");
        continue;
      }
      line(std::string("    load_lanes<") + storage_type(shape_.loads[i].dtype) + ", " + boolean(shape_.loads[i].moves) +
           ">(in, " + k + ", bases[" + k + "], offsets[" + k + "], count);");
    }
    line("  }");
  }

  // Where the code of long primitives would stand many times over, each becomes a function that is called: compiling 64 cosines
  // takes 0.2 s instead of 9, and the code stays in the instruction cache.
  void find_called() {
    constexpr std::size_t kInlined = 32;  // instances
    std::size_t instances = 0;
    std::array<bool, kPrimCount> used{};
    for (const Instruction& instruction : code_.instructions) {
      if (!is_long(instruction.prim)) continue;
      used[static_cast<std::size_t>(instruction.prim)] = true;
      instances += static_cast<std::size_t>(shape_.width * shape_.unroll);
    }
    if (instances <= kInlined) return;
    called_ = used;
    for (int p = 0; p < kPrimCount; ++p) {
      if (!called_[p]) continue;
      const PrimInfo& primitive = info(static_cast<Prim>(p));
      std::string parameters, arguments;
      for (int k = 0; k < primitive.arity; ++k) {
        const std::string name = "x" + std::to_string(k);
        (parameters += k ? ", Compute " : "Compute ") += name;
        (arguments += k ? ", " : "") += name;
      }
      line(std::string("  static __device__ __noinline__ Compute call_") + primitive.name + "(" + parameters + ") {");
      line(std::string("    return prim::Op<Prim::") + primitive.name + ">::value(" + arguments + ");");
      line("  }");
    }
  }

  std::string function(Prim prim) const {
    if (called_[static_cast<std::size_t>(prim)]) return std::string("call_") + info(prim).name;
    return std::string("prim::Op<Prim::") + info(prim).name + ">::value";
  }

  // Of the value each register holds at first; slots are taken again, values have names of their own.
  template <class Operand>
  std::vector<std::string> first_names(const Operand& operand) const {
    std::vector<std::string> names;
    for (std::size_t i = 0; i < code_.loads.size(); ++i) names.push_back(operand(std::to_string(i)));
    for (double value : code_.constants) names.push_back("Compute(" + literal(value) + ")");
    names.resize(names.size() + code_.slots);
    return names;
  }

  std::string call(const Instruction& instruction, const std::vector<std::string>& names) const {
    std::string text = function(instruction.prim) + "(";
    for (int k = 0; k < info(instruction.prim).arity; ++k) (text += k ? ", " : "") += names[instruction.args[k]];
    return text + ")";
  }

  void evaluate() {
    line("  WENGERT_DEVICE static void evaluate(const Compute* a, Compute* r) {");
    std::vector<std::string> names = first_names([](const std::string& i) { return "a[" + i + "]"; });
    for (std::size_t i = 0; i < code_.instructions.size(); ++i) {
      const std::string result = "t" + std::to_string(i);
      line("    const Compute " + result + " = " + call(code_.instructions[i], names) + ";");
      names[code_.instructions[i].result] = result;
    }
    for (std::size_t i = 0; i < code_.outputs.size(); ++i)
      line("    r[" + std::to_string(i) + "] = " + names[code_.outputs[i]] + ";");
    line("  }");
  }

  // Every value is an array of the group's lanes.
  void stream() {
    constexpr const char* kLanes = "_Pragma(\"unroll\") for (int w = 0; w < kWidth; ++w) ";
    line("  template <class Offset>");
    line("  WENGERT_DEVICE static void stream(const void* const* bases, const Offset& offset_of, int count,");
    line("                                    Compute (&out)[kWidth][kOutputs]) {");
    std::vector<std::string> names = first_names([](const std::string& i) { return "a" + i + "[w][0]"; });
    std::vector<bool> loaded(code_.loads.size(), false);
    const auto need = [&](std::uint16_t used) {
      if (used >= loaded.size() || loaded[used]) return;
      loaded[used] = true;
      const KernelShape::Load& operand = shape_.loads[used];
      const std::string k = std::to_string(used), type = storage_type(operand.dtype);
      line("    Compute a" + k + "[kWidth][1];");
      line(operand.immediate ? "    load_immediate<" + type + ">(a" + k + ", 0, bases + " + k + ");"
                             : "    load_lanes<" + type + ", " + boolean(operand.moves) + ">(a" + k + ", 0, bases[" + k +
                                   "], offset_of(" + k + "), count);");
    };
    for (std::size_t i = 0; i < code_.instructions.size(); ++i) {
      const Instruction& instruction = code_.instructions[i];
      for (int k = 0; k < info(instruction.prim).arity; ++k) need(instruction.args[k]);
      const std::string result = "t" + std::to_string(i);
      line("    Compute " + result + "[kWidth];");
      line("    " + std::string(kLanes) + result + "[w] = " + call(instruction, names) + ";");
      names[instruction.result] = result + "[w]";
    }
    for (std::size_t i = 0; i < code_.outputs.size(); ++i) {
      need(code_.outputs[i]);
      line("    " + std::string(kLanes) + "out[w][" + std::to_string(i) + "] = " + names[code_.outputs[i]] + ";");
    }
    line("  }");
  }

  void store_elements() {
    line("  WENGERT_DEVICE static void store_elements(void* const* bases, const Index* offsets,");
    line("                                            const Compute (&out)[kWidth][kOutputs], int count) {");
    for (std::size_t i = shape_.sums; i < shape_.stores.size(); ++i) {
      const std::string k = std::to_string(i);
      line("    store_lanes<" + store_type(i) + ", true>(bases[" + k + "], offsets[" + std::to_string(i - shape_.sums) +
           "], 1, out, " + k + ", count);");
    }
    line("  }");
  }

  // Sums are few, and are stored one by one.
  void store_sums() {
    line("  template <int W>");
    line("  WENGERT_DEVICE static void store_sums(void* const* bases, const Index* offsets, const Index* strides,");
    line("                                        const double (&out)[W][kSums]) {");
    for (int i = 0; i < shape_.sums; ++i) {
      const std::string k = std::to_string(i);
      line("    store_lanes<" + store_type(i) + ", false>(bases[" + k + "], offsets[" + k + "], strides[" + k + "], out, " + k +
           ", W);");
    }
    line("  }");
  }

  std::string store_type(std::size_t i) const {
    return std::string(storage_type(shape_.stores[i].dtype)) + ", " + boolean(shape_.stores[i].accumulate);
  }

  const Bytecode& code_;
  const Program& program_;
  const KernelShape& shape_;
  std::array<bool, kPrimCount> called_{};  // primitives that are functions of the kernel
  std::string text_;
};

}  // namespace

std::string cuda_source(const Program& program, const KernelShape& shape) { return Emitter(program, shape).emit(); }

}  // namespace wengert::fused
