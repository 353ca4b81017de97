// A tape as text: one line a node with its edges, then the operator of each.
#include "tape/print.h"

#include <sstream>

namespace wengert::tape {

namespace {

struct Printer {
  std::ostringstream out;

  template <class T>
  void list(const std::vector<T>& items) {
    out << '(';
    for (std::size_t k = 0; k < items.size(); ++k) out << (k ? "," : "") << items[k];
    out << ')';
  }
  void map(const AxisMap& map) {
    out << map.start;
    for (const AxisTerm& term : map.terms) out << '+' << term.step << "*i" << term.source;
    if (map.index_slot < 0) return;
    out << "+s" << map.index_slot;
    axes(map.index_axes);
  }
  void axes(const std::vector<AxisMap>& maps) {
    out << '[';
    for (std::size_t k = 0; k < maps.size(); ++k) {
      if (k) out << ", ";
      map(maps[k]);
    }
    out << ']';
  }
  void step(const Gather& gather) {
    out << "gather";
    list(gather.in_shape);
    axes(gather.axes);
    if (!gather.loops.empty()) {
      out << " over ";
      list(gather.loops);
    }
    for (std::size_t k = 0; k < gather.factor.operands.size(); ++k) {
      out << " p" << k << "=s" << gather.factor.operands[k].slot;
      axes(gather.factor.operands[k].axes);
    }
  }
  void step(const Scatter& scatter) {
    out << "scatter";
    list(scatter.in_shape);
    for (const ScatterAxis& axis : scatter.axes) out << ' ' << axis.offset << '+' << axis.step << "*x" << axis.in_axis;
  }
  void step(const IndexScatter& scatter) {
    out << "index_scatter";
    list(scatter.in_shape);
    out << " axis " << scatter.axis << " s" << scatter.index_slot;
  }
  void step(const Reshape& reshape) {
    out << "reshape";
    list(reshape.in_shape);
  }
  void term(const Term& term) {
    for (std::size_t q = 0; q < term.size(); ++q) {
      if (q) out << " . ";
      std::visit([this](const auto& one) { step(one); }, term[q]);
    }
  }
  void pullback(const Pullback& pullback) {
    switch (pullback.kind) {
      case Kind::none:
        out << "none";
        return;
      case Kind::zero:
        out << "zero";
        return;
      case Kind::opaque:
        out << "opaque";
        return;
      case Kind::local:
        out << "local";
        list(pullback.local.tied);
        return;
      case Kind::terms:
        for (std::size_t k = 0; k < pullback.terms.size(); ++k) {
          if (k) out << " + ";
          if (pullback.terms[k].empty()) out << "identity";
          term(pullback.terms[k]);
        }
        if (!pullback.after.empty()) {
          out << ", then ";
          term(pullback.after);
        }
        return;
    }
  }
};

}  // namespace

std::string to_string(const Pullback& pullback) {
  Printer printer;
  printer.pullback(pullback);
  return printer.out.str();
}

std::string to_string(const Tape& tape) {
  Printer printer;
  fused::ExprPool pool;
  for (std::size_t k = 0; k < tape.nodes.size(); ++k) {
    const Node& node = tape.nodes[k];
    printer.out << k << ' ' << name(node);
    for (const Meta& meta : node.outputs) {
      printer.out << ' ' << (meta.complex ? "pairs of " : "") << c10::toString(meta.dtype);
      printer.list(meta.shape);
    }
    printer.out << '\n';
    for (std::size_t input = 0; input < node.inputs.size(); ++input) {
      if (node.inputs[input].node < 0) continue;
      for (std::size_t output = 0; output < node.outputs.size(); ++output) {
        if (node.outputs[output].dtype == at::ScalarType::Undefined) continue;
        printer.out << "  " << output << " <- " << node.inputs[input].node << '.' << node.inputs[input].output << ": ";
        printer.pullback(describe(tape, node, static_cast<int>(output), static_cast<int>(input), pool));
        printer.out << '\n';
      }
    }
  }
  return printer.out.str();
}

}  // namespace wengert::tape
