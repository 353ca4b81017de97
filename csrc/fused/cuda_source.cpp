#include "fused/cuda_source.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "fused/sections.h"

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
  Emitter(const Program& program, const KernelShape& shape)
      : code_(program.bytecode()), program_(program), shape_(shape), kinds_(kinds_of(shape)), listing_(code_, kinds_) {}

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
    line(std::string("  static constexpr bool kInMemory = ") + boolean(shape_.in_memory) + ";");
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
  static std::vector<std::uint8_t> kinds_of(const KernelShape& shape) {
    std::vector<std::uint8_t> kinds;
    for (const KernelShape::Load& load : shape.loads) kinds.push_back(load.kind());
    return kinds;
  }

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
    constexpr int kInlined = 32;  // instances
    int instances = 0;
    std::array<bool, kPrimCount> used{};
    for (const Section& section : listing_.sections()) {
      for (std::int32_t i = section.first; i < section.first + section.length; ++i) {
        const Prim prim = code_.instructions[i].prim;
        if (!is_long(prim)) continue;
        used[static_cast<std::size_t>(prim)] = true;
        instances += shape_.width * shape_.unroll * passes_at_once(section);
      }
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

  // `name` gives the text of an argument by its position.
  template <class Name>
  std::string call(std::int32_t instruction, const Name& name) const {
    const Prim prim = code_.instructions[instruction].prim;
    std::string text = called_[static_cast<std::size_t>(prim)] ? std::string("call_") + info(prim).name
                                                               : std::string("prim::Op<Prim::") + info(prim).name + ">::value";
    for (int k = 0; k < info(prim).arity; ++k) (text += k ? ", " : "(") += name(k);
    return text + ")";
  }

  std::string constant_text(std::int32_t index) const { return "Compute(" + literal(code_.constants[index]) + ")"; }

  void evaluate() {
    line("  WENGERT_DEVICE static void evaluate(const Compute* a, Compute* r) {");
    const auto name = [&](const Argument& argument) {
      if (argument.kind == Argument::Kind::constant) return constant_text(argument.index);
      const std::string index = std::to_string(argument.index);
      return argument.kind == Argument::Kind::load ? "a[" + index + "]" : "t" + index;
    };
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(code_.instructions.size()); ++i) {
      line("    const Compute t" + std::to_string(i) + " = " + call(i, [&](int k) { return name(listing_.arguments(i)[k]); }) +
           ";");
    }
    for (std::size_t i = 0; i < code_.outputs.size(); ++i)
      line("    r[" + std::to_string(i) + "] = " + name(listing_.outputs()[i]) + ";");
    line("  }");
  }

  // ------------------------------------------------------------------------------------------------------------------ streamed
  // Passes of a loop whose loads are on their way together.
  static int passes_at_once(const Section& section) {
    constexpr std::int32_t kInstructions = 16;
    return section.passes == 1 ? 1 : std::clamp(kInstructions / section.length, 1, 4);
  }

  // Every value is an array of the group's lanes: value i is t<i>; within a loop, c<i> is what its position held in the pass
  // before.
  void stream() {
    const std::vector<Section>& sections = listing_.sections();
    line("  using Lanes = wengert::fused::Lanes<Compute, kWidth>;");
    if (sections.size() > 1) {
      for (const Section& section : sections) function(section);
    }
    line("  template <class From>");
    line("  WENGERT_DEVICE static void stream(const From& from, Compute (&out)[kWidth][kOutputs]) {");
    read_.clear();
    if (sections.size() > 1) {
      for (const Section& section : sections) {
        std::string arguments = "from";
        for (const std::int32_t value : taken(section)) arguments += ", t" + std::to_string(value);
        for (const std::int32_t value : given(section)) {
          line("    Lanes t" + std::to_string(value) + ";");
          arguments += ", t" + std::to_string(value);
        }
        line("    " + function_name(section) + "(" + arguments + ");");
      }
    } else {
      pass(sections.front(), "    ");
    }
    for (std::size_t i = 0; i < code_.outputs.size(); ++i) {
      const std::string value = operand(listing_.outputs()[i], 0, "    ");
      line("    " + std::string(kLanes) + "out[w][" + std::to_string(i) + "] = " + value + ";");
    }
    line("  }");
  }

  static std::string function_name(const Section& section) { return "section_" + std::to_string(section.first); }

  // Values of earlier sections that this one reads, each once.
  std::vector<std::int32_t> taken(const Section& section) const {
    std::vector<std::int32_t> values;
    for (std::int32_t i = section.first; i < section.first + section.length; ++i) {
      for (const Argument& argument : listing_.arguments(i)) {
        if (argument.kind == Argument::Kind::value && argument.index < section.first) values.push_back(argument.index);
      }
    }
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    return values;
  }

  // Values of its last pass that later sections or outputs read.
  std::vector<std::int32_t> given(const Section& section) const {
    std::vector<std::int32_t> values;
    for (std::int32_t i = section.end() - section.length; i < section.end(); ++i) {
      if (listing_.last_use(i) >= section.end()) values.push_back(i);
    }
    return values;
  }

  void function(const Section& section) {
    std::string parameters = "From from";
    for (const std::int32_t value : taken(section)) parameters += ", Lanes t" + std::to_string(value);
    for (const std::int32_t value : given(section)) parameters += ", Lanes& r" + std::to_string(value);
    line("  template <class From>");
    line("  static __device__ __noinline__ void " + function_name(section) + "(" + parameters + ") {");
    read_.clear();
    if (section.passes == 1) {
      pass(section, "    ");
      for (const std::int32_t value : given(section)) {
        const std::string i = std::to_string(value);
        line("    r" + i + " = t" + i + ";");
      }
    } else {
      loop(section);
    }
    line("  }");
  }

  void loop(const Section& section) {
    std::vector<std::int32_t> kept;  // positions that the next pass or a later section reads
    for (std::int32_t i = section.first; i < section.first + section.length; ++i) {
      for (int k = 0; k < static_cast<int>(listing_.arguments(i).size()); ++k) {
        const Argument& argument = listing_.arguments(i)[k];
        if (is_carried(section, i, k)) kept.push_back(argument.index + section.length);
        if (argument.kind == Argument::Kind::load && listing_.step(section, i, k) == 0) operand(argument, 0, "    ");
      }
    }
    for (const std::int32_t value : given(section)) kept.push_back(value - (section.passes - 1) * section.length);
    std::sort(kept.begin(), kept.end());
    kept.erase(std::unique(kept.begin(), kept.end()), kept.end());
    const std::vector<std::int32_t> before = taken(section);
    for (const std::int32_t position : kept) {
      const std::string i = std::to_string(position), first = std::to_string(position - section.length);
      const bool starts = std::binary_search(before.begin(), before.end(), position - section.length);
      line("    Lanes c" + i + (starts ? " = t" + first : "") + ";");
    }
    line("    _Pragma(\"unroll " + std::to_string(passes_at_once(section)) + "\")");
    line("    for (int pass = 0; pass < " + std::to_string(section.passes) + "; ++pass) {");
    pass(section, "      ");
    for (const std::int32_t position : kept) line("      c" + std::to_string(position) + " = t" + std::to_string(position) + ";");
    line("    }");
    for (const std::int32_t value : given(section)) {
      line("    r" + std::to_string(value) + " = c" + std::to_string(value - (section.passes - 1) * section.length) + ";");
    }
  }

  // Whether an argument is what the pass before computed.
  bool is_carried(const Section& section, std::int32_t instruction, int k) const {
    const Argument& argument = listing_.arguments(instruction)[k];
    return section.passes > 1 && argument.kind == Argument::Kind::value && argument.index < section.first &&
           listing_.step(section, instruction, k) != 0;
  }

  void pass(const Section& section, const std::string& indent) {
    for (std::int32_t i = section.first; i < section.first + section.length; ++i) {
      const std::string value = call(i, [&](int k) {
        const Argument& argument = listing_.arguments(i)[k];
        if (is_carried(section, i, k)) return "c" + std::to_string(argument.index + section.length) + kLane;
        return operand(argument, section.passes > 1 ? listing_.step(section, i, k) : 0, indent);
      });
      line(indent + "Lanes t" + std::to_string(i) + ";");
      line(indent + kLanes + "t" + std::to_string(i) + kLane + " = " + value + ";");
    }
  }

  // The text of an argument; reads a load that was not read yet, which may lie `step` loads further on in every pass.
  std::string operand(const Argument& argument, std::int32_t step, const std::string& indent) {
    if (argument.kind == Argument::Kind::constant) return constant_text(argument.index);
    if (argument.kind == Argument::Kind::value) return "t" + std::to_string(argument.index) + kLane;
    const KernelShape::Load& load = shape_.loads[argument.index];
    std::string position = std::to_string(argument.index), name = "a" + position;
    if (step != 0) {
      name += (step < 0 ? "_less" : "_") + std::to_string(std::abs(step));
      position += " + pass * " + std::to_string(step);
    }
    if (std::find(read_.begin(), read_.end(), name) == read_.end()) {
      read_.push_back(name);
      const std::string type = storage_type(load.dtype);
      line(indent + "Lanes " + name + ";");
      line(indent + (load.immediate ? "read_immediate<" + type : "read<" + type + ", " + boolean(load.moves)) + ">(from, " +
           position + ", " + name + ");");
    }
    return name + kLane;
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

  static constexpr const char* kLanes = "_Pragma(\"unroll\") for (int w = 0; w < kWidth; ++w) ";
  static constexpr const char* kLane = ".at[w][0]";

  const Bytecode& code_;
  const Program& program_;
  const KernelShape& shape_;
  const std::vector<std::uint8_t> kinds_;
  const Listing listing_;
  std::array<bool, kPrimCount> called_{};  // primitives that are functions of the kernel
  std::vector<std::string> read_;          // operands that the function at hand has read so far
  std::string text_;
};

}  // namespace

std::string cuda_source(const Program& program, const KernelShape& shape) { return Emitter(program, shape).emit(); }

std::string table_source() {
  return std::string("#include \"fused/nest_kernel.h\"\nusing namespace wengert::fused;\n") +
         "extern \"C\" __global__ void __launch_bounds__(kBlockThreads) " + kTableEntry +
         "(const __grid_constant__ TablePiece p) { write_table(p); }\n";
}

}  // namespace wengert::fused
