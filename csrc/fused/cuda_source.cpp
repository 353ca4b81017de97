#include "fused/cuda_source.h"

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
    load();
    evaluate();
    store_elements();
    if (sums) store_sums();
    line("};");
    const char* parameters = sums ? "SumParameters" : "MapParameters";
    line(std::string("extern \"C\" __global__ void __launch_bounds__(kBlockThreads) ") + (sums ? kSumEntry : kMapEntry) +
         "(const __grid_constant__ " + parameters + "<Nest> p) {");
    if (sums) {
      line(std::string("  sum<Nest, ") + boolean(shape_.variant == KernelShape::Variant::sum_rows) + ">(p);");
    } else {
      line("  map<Nest>(p);");
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

  void evaluate() {
    line("  WENGERT_DEVICE static void evaluate(const Compute* a, Compute* r) {");
    std::vector<std::string> names;  // of the value each register holds; slots are taken again, values have names of their own
    for (std::size_t i = 0; i < code_.loads.size(); ++i) names.push_back("a[" + std::to_string(i) + "]");
    for (double value : code_.constants) names.push_back("Compute(" + literal(value) + ")");
    names.resize(names.size() + code_.slots);
    for (std::size_t i = 0; i < code_.instructions.size(); ++i) {
      const Instruction& instruction = code_.instructions[i];
      const PrimInfo& primitive = info(instruction.prim);
      const std::string result = "t" + std::to_string(i);
      std::string text = "    const Compute " + result + " = prim::Op<Prim::" + primitive.name + ">::value(";
      for (int k = 0; k < primitive.arity; ++k) (text += k ? ", " : "") += names[instruction.args[k]];
      line(text + ");");
      names[instruction.result] = result;
    }
    for (std::size_t i = 0; i < code_.outputs.size(); ++i)
      line("    r[" + std::to_string(i) + "] = " + names[code_.outputs[i]] + ";");
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
  std::string text_;
};

}  // namespace

std::string cuda_source(const Program& program, const KernelShape& shape) { return Emitter(program, shape).emit(); }

}  // namespace wengert::fused
