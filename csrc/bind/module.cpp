// The Python module wengert._C.  Nothing outside this room includes pybind11.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <ATen/Functions.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SequenceNumber.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <typeinfo>

#include "accumulate/derivatives.h"
#include "accumulate/question.h"
#include "accumulate/route.h"
#include "bind/cuda_plan.h"
#include "bind/cuda_static.h"
#include "bind/evaluator.h"
#include "bind/plan_faults.h"
#include "bind/random_state.h"
#include "common/node_ptr.h"
#include "ops/composed.h"
#include "ops/finite.h"
#include "tape/ambient.h"
#include "tape/custom.h"
#include "tape/forward_mode.h"
#include "tape/opaque_reasons.h"
#include "tape/pass.h"
#include "tape/print.h"
#include "tape/reader.h"
#include "tape/tape.h"
#include "tape/vmap_watch.h"

namespace py = pybind11;

namespace {

namespace accumulate = wengert::accumulate;

using Tensors = std::vector<at::Tensor>;

py::object to_python(const at::Tensor& tensor) { return tensor.defined() ? py::cast(tensor) : py::none(); }

py::list to_python(const Tensors& row) {
  py::list out(row.size());
  for (std::size_t i = 0; i < row.size(); ++i) out[i] = to_python(row[i]);
  return out;
}

py::list to_python(const accumulate::TensorRows& rows) {
  py::list out(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) out[i] = to_python(rows[i]);
  return out;
}

// The tensors of a sequence.  A subclass other than Parameter may compute whatever it likes.
Tensors plain(const py::sequence& given) {
  Tensors out;
  out.reserve(given.size());
  for (const py::handle item : given) {
    if (THPVariable_Check(item.ptr()) && !THPVariable_CheckExact(item.ptr()))
      throw wengert::tape::Unsupported("a tensor subclass");
    out.push_back(item.cast<at::Tensor>());
  }
  return out;
}

bool take_plain(const py::object& given, Tensors& out) {
  const auto take = [&out](PyObject* item) {
    if (!THPVariable_CheckExact(item)) return false;
    out.push_back(THPVariable_Unpack(item));
    return true;
  };
  if (!PyTuple_Check(given.ptr()) && !PyList_Check(given.ptr())) return take(given.ptr());
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(given.ptr());
  for (Py_ssize_t k = 0; k < count; ++k) {
    if (!take(PySequence_Fast_GET_ITEM(given.ptr(), k))) return false;
  }
  return true;
}

accumulate::Mode mode(bool create_graph, bool at_once = false) {
  return !create_graph ? accumulate::Mode::plain : at_once ? accumulate::Mode::at_once : accumulate::Mode::differentiable;
}

// Runs f without the GIL; nodes written in Python take it back for themselves.  Warnings become Python's.  Within a backward pass
// f gets one of its own, as PyTorch's functions do.
template <class F>
auto released(F&& f) {
  torch::PyWarningHandler warnings;
  try {
    const py::gil_scoped_release release;
    if (!wengert::tape::inside_pass()) return f();
    std::optional<std::invoke_result_t<F>> result;
    wengert::tape::in_own_pass(true, [&] { result.emplace(f()); });
    return *std::move(result);
  } catch (...) {
    warnings.set_in_exception();  // where warnings are errors, they must not be thrown on the way out of another one
    throw;
  }
}

bool saves_through_hooks(const torch::autograd::Node& fn) {
  if (std::strstr(typeid(fn).name(), "PyNode") == nullptr) return false;
  const py::gil_scoped_acquire gil;
  const auto function = py::reinterpret_steal<py::object>(
      torch::autograd::functionToPyObject(wengert::common::share(const_cast<torch::autograd::Node*>(&fn))));
  const auto& saved = reinterpret_cast<const THPFunction*>(function.ptr())->saved_variables;
  return std::ranges::any_of(saved, &torch::autograd::SavedVariable::has_hooks);
}

// Whether an exception, or one in whose handling it was raised, is one of those that end a program: KeyboardInterrupt,
// SystemExit. But not one that was being handled before, `handled`, or None.
bool ends_a_program(py::handle raised, py::handle handled) {
  constexpr int kMost = 64;  // as many as anybody has: exceptions may be made to go in circles
  py::object at = py::reinterpret_borrow<py::object>(raised);
  for (int k = 0; k < kMost && at && !at.is_none() && !at.is(handled); ++k) {
    if (PyErr_GivenExceptionMatches(at.ptr(), PyExc_Exception) == 0) return true;
    if (PyExceptionInstance_Check(at.ptr()) == 0) return false;
    at = py::reinterpret_steal<py::object>(PyException_GetContext(at.ptr()));
  }
  return false;
}

// Whatever a Function raises may be due to how it was called, but for what ends a program and what handlers of signals raise
// (TimeoutError).
bool may_be_due_to_the_call(py::handle raised, py::handle handled) {
  return PyErr_GivenExceptionMatches(raised.ptr(), PyExc_OSError) == 0 && !ends_a_program(raised, handled);
}

bool may_retry(const std::exception& error) {
  const py::gil_scoped_acquire gil;
  PyObject *type = nullptr, *value = nullptr, *traceback = nullptr;
  PyErr_GetExcInfo(&type, &value, &traceback);
  const auto handled = py::reinterpret_steal<py::object>(value);
  Py_XDECREF(type);
  Py_XDECREF(traceback);
  if (PyErr_Occurred() != nullptr) {
    py::error_already_set current;  // takes it
    if (ends_a_program(current.value(), handled)) {
      current.restore();
      return false;
    }
  }
  if (const auto* raised = dynamic_cast<const python_error*>(&error); raised && raised->type) {
    const bool made = raised->value && PyExceptionInstance_Check(raised->value) != 0;
    return may_be_due_to_the_call(made ? raised->value : raised->type, handled);
  }
  if (const auto* raised = dynamic_cast<const py::error_already_set*>(&error)) {
    return may_be_due_to_the_call(raised->value(), handled);
  }
  return true;
}

at::Tensor fresh_leaf(const at::Tensor& x) {
  constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                         c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::Batched});
  if (x.key_set().has_any(wrapped)) return x.detach().set_requires_grad(true);  // what is left of a transform, say
  // detach(), without its way through the dispatcher: it takes as long as reading the graph of a few operators.
  const c10::TensorImpl* impl = x.unsafeGetTensorImpl();
  const at::Tensor leaf(impl->shallow_copy_and_detach(impl->version_counter(), /*allow_tensor_metadata_change=*/false));
  leaf.set_requires_grad(true);
  return leaf;
}

// Why PyTorch is asked about the graph of a function that did so: it mostly raises an error.
constexpr const char* kDetached = "an argument that is detached in place";

// The leaf that a function form differentiates by; undefined where the engine does not take the input.
at::Tensor fresh_leaf(PyObject* input) {
  if (!THPVariable_CheckExact(input)) return {};
  const at::Tensor& x = THPVariable_Unpack(input);
  if (x.layout() != at::kStrided || !at::isFloatingType(x.scalar_type())) return {};
  return fresh_leaf(x);
}

// The leaf that a transform differentiates by, and its node, to be kept as long as the leaf: what the caller has computed before
// does not lead to it, and no walk has to look there.
std::pair<at::Tensor, py::object> transform_leaf(const at::Tensor& tensor) {
  const at::Tensor leaf = fresh_leaf(tensor);
  const wengert::common::NodePtr node = torch::autograd::impl::grad_accumulator(leaf);
  wengert::common::raise_topological_nr(*node);
  return {leaf, py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node))};
}

// The same, hanging on the graph of the tensor.  What is written to it without a history leaves its place in the graph alone, as
// of a leaf; a differentiable view would get another one.
at::Tensor attached_leaf(const at::Tensor& tensor) {
  const at::Tensor view = tensor.view_as(tensor);
  wengert::common::raise_topological_nr(*view.grad_fn());
  const at::Tensor leaf = view.detach();
  torch::autograd::impl::set_gradient_edge(leaf, torch::autograd::impl::gradient_edge(view));
  return leaf;
}

// Makes a tensor what it was before something with a history was written to it; a view, too.
void forget_history(const at::Tensor& tensor) {
  torch::autograd::AutogradMeta* meta = torch::autograd::impl::get_autograd_meta(tensor);
  if (meta == nullptr) return;
  meta->grad_fn_.reset();
  meta->output_nr_ = 0;
  meta->set_requires_grad(false, tensor.unsafeGetTensorImpl());
  auto* view = torch::autograd::impl::get_view_autograd_meta(tensor);
  if (view != nullptr && view->has_bw_view()) view->set_attr_version(tensor._version());
}

// Zeros for what is not connected: block [i][j] belongs to one of `outputs` and one of `inputs`, whose first axes it shares.
accumulate::TensorRows filled(accumulate::TensorRows blocks, const Tensors& outputs, const Tensors& inputs, int shared = 0) {
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    for (std::size_t j = 0; j < blocks[i].size(); ++j) {
      if (blocks[i][j].defined()) continue;
      std::vector<std::int64_t> shape = outputs[i].sizes().vec();
      shape.insert(shape.end(), inputs[j].sizes().begin() + shared, inputs[j].sizes().end());
      blocks[i][j] = at::zeros(shape, inputs[j].options());
    }
  }
  return blocks;
}

py::object nest(const Tensors& row, bool several) {
  if (!several) return py::cast(row[0]);
  py::tuple out(row.size());
  for (std::size_t j = 0; j < row.size(); ++j) out[j] = py::cast(row[j]);
  return std::move(out);
}

py::object nest(const accumulate::TensorRows& rows, bool several_outputs, bool several_inputs) {
  if (!several_outputs) return nest(rows[0], several_inputs);
  py::tuple out(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) out[i] = nest(rows[i], several_inputs);
  return std::move(out);
}

// The function form for plain tensors in, a tuple of them or one, and one out, which is most calls, without going through Python
// for every step: `derive` of `func` at `inputs`.  None: nothing has been done yet.  A list (leaves, output, reason): `func` has
// run, and the rest has to be done with more care, or by PyTorch for that reason.  `square`: the rows are nested as the inputs
// are.
template <class Derive>
py::object of_function(const py::object& func, const py::object& inputs, const Derive& derive, bool square = false) {
  if (at::impl::PythonTorchFunctionTLS::stack_len() != 0 || wengert::tape::ambient_refusal() != nullptr) return py::none();
  const bool several = PyTuple_CheckExact(inputs.ptr()) != 0;
  const std::size_t count = several ? PyTuple_GET_SIZE(inputs.ptr()) : 1;
  if (count == 0) return py::none();
  const torch::autograd::AutoGradMode grad_mode(true);
  Tensors leaves(count);
  for (std::size_t k = 0; k < count; ++k) {
    leaves[k] = fresh_leaf(several ? PyTuple_GET_ITEM(inputs.ptr(), k) : inputs.ptr());
    if (!leaves[k].defined()) return py::none();
  }
  py::object arguments = py::cast(leaves[0]);
  if (several) {
    py::tuple all(count);
    for (std::size_t k = 0; k < count; ++k) all[k] = py::cast(leaves[k]);
    arguments = std::move(all);
  }
  const auto output = py::reinterpret_steal<py::object>(several ? PyObject_Call(func.ptr(), arguments.ptr(), nullptr)
                                                                : PyObject_CallOneArg(func.ptr(), arguments.ptr()));
  if (!output) throw py::error_already_set();
  py::object reason = py::none();
  if (!std::ranges::all_of(leaves, &at::Tensor::requires_grad)) {
    reason = py::str(kDetached);
  } else if (THPVariable_CheckExact(output.ptr())) {
    try {
      return nest(derive({THPVariable_Unpack(output.ptr())}, leaves), square && several, several);
    } catch (const accumulate::CoupledSamples&) {  // met again where it is known what to do about them
    } catch (const wengert::tape::Unsupported& error) {
      reason = py::str(error.what());
    }
  }
  py::list begun;
  begun.append(several ? arguments : py::object(py::make_tuple(arguments)));
  begun.append(output);
  begun.append(reason);
  return std::move(begun);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The engine of wengert.";
  wengert::tape::set_python_knowledge({.saves_through_hooks = saves_through_hooks, .may_retry = may_retry});
  const auto& unsupported = py::register_exception<wengert::tape::Unsupported>(m, "Unsupported", PyExc_RuntimeError);
  static const py::object coupled = py::exception<accumulate::CoupledSamples>(m, "CoupledSamples", unsupported);
  py::register_exception_translator([](std::exception_ptr thrown) {  // asked before the one above
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const accumulate::CoupledSamples& error) {
      const py::object value = coupled(error.what());
      value.attr("node") = error.node;
      value.attr("read") = error.read;
      PyErr_SetObject(coupled.ptr(), value.ptr());
    }
  });

  m.def(
      "jacobian",
      [](const py::sequence& outputs, const py::sequence& inputs, bool create_graph, bool none_is_zero, bool at_once,
         bool by_sample) {
        const Tensors ys = plain(outputs), xs = plain(inputs);
        return to_python(
            released([&] { return accumulate::jacobian(ys, xs, mode(create_graph, at_once), none_is_zero, by_sample); }));
      },
      py::arg("outputs"), py::arg("inputs"), py::arg("create_graph"), py::arg("none_is_zero") = true, py::arg("at_once") = false,
      py::arg("by_sample") = false);
  m.def(
      "batch_jacobian",
      [](const py::sequence& outputs, const py::sequence& inputs, bool create_graph, bool check) {
        const Tensors ys = plain(outputs), xs = plain(inputs);
        return to_python(released([&] { return accumulate::batch_jacobian(ys, xs, mode(create_graph), check); }));
      },
      py::arg("outputs"), py::arg("inputs"), py::arg("create_graph"), py::arg("check"));
  m.def("jacobian_of", [](const py::object& func, const py::object& inputs) {
    return of_function(func, inputs, [](const Tensors& ys, const Tensors& xs) {
      if (ys[0].numel() == 0) throw wengert::tape::Unsupported("an output without elements");
      return filled(released([&] { return accumulate::jacobian(ys, xs, accumulate::Mode::plain); }), ys, xs);
    });
  });
  m.def("hessian_of", [](const py::object& func, const py::object& inputs) {
    return of_function(
        func, inputs,
        [](const Tensors& ys, const Tensors& xs) {
          if (ys[0].numel() != 1) throw wengert::tape::Unsupported("an output of several elements");
          if (std::ranges::any_of(xs, [](const at::Tensor& x) { return x.numel() == 0; })) {
            throw wengert::tape::Unsupported("an input without elements");
          }
          return filled(released([&] { return accumulate::hessian(ys[0], xs, accumulate::Mode::plain); }), xs, xs);
        },
        /*square=*/true);
  });
  m.def("batch_jacobian_of", [](const py::object& func, const py::object& inputs) {
    return of_function(func, inputs, [](const Tensors& ys, const Tensors& xs) {
      return filled(released([&] { return accumulate::batch_jacobian(ys, xs, accumulate::Mode::plain, true); }), ys, xs, 1);
    });
  });
  m.def(
      "grad",
      [](const py::sequence& outputs, const py::sequence& inputs, const py::sequence& cotangents, bool retain_graph,
         bool create_graph, bool batched, bool asked) {
        const Tensors ys = plain(outputs), xs = plain(inputs), given = plain(cotangents);
        return to_python(released([&] {
          return accumulate::gradient(ys, xs, given, retain_graph, mode(create_graph), batched, /*none_is_zero=*/false, asked);
        }));
      },
      py::arg("outputs"), py::arg("inputs"), py::arg("cotangents"), py::arg("retain_graph"), py::arg("create_graph"),
      py::arg("is_grads_batched"), py::arg("asked"));
  m.def(
      "hessian",
      [](const py::object& output, const py::sequence& inputs, bool create_graph, bool at_once) {
        const Tensors y = plain(py::make_tuple(output)), xs = plain(inputs);
        return to_python(released([&] { return accumulate::hessian(y[0], xs, mode(create_graph, at_once)); }));
      },
      py::arg("output"), py::arg("inputs"), py::arg("create_graph"), py::arg("at_once") = false);
  m.def(
      "refusal_of_history",
      [](const py::object& outputs, const py::object& inputs) -> py::object {
        Tensors ys, xs;
        const bool refused = take_plain(outputs, ys) && take_plain(inputs, xs) && accumulate::is_shorter_in_pytorch(ys, xs);
        return refused ? py::cast(accumulate::kShorterInPyTorch) : py::none();
      },
      py::arg("outputs"), py::arg("inputs"), "Why a gradient with a history is known to be PyTorch's, or None.");
  m.def("refusal", &wengert::tape::ambient_refusal);
  m.def("forward_mode", [](const py::sequence& outputs, const py::sequence& inputs) {
    const wengert::tape::ForwardMode found = wengert::tape::forward_mode(plain(outputs), plain(inputs));
    return py::make_tuple(found.differs, found.masks);
  });
  m.def("begin_vmap_watch", &wengert::tape::begin_vmap_watch);
  m.def("end_vmap_watch", &wengert::tape::end_vmap_watch);
  m.def("take_structures", &accumulate::take_structures);
  m.def("explain", [](const Tensors& outputs, const Tensors& inputs) {
    py::list rows;
    for (const accumulate::NodeReport& node : released([&] { return accumulate::explain(outputs, inputs); }).nodes) {
      py::dict row;
      row["node"] = node.node;
      row["kind"] = node.kind;
      row["structure"] = node.structure;
      row["blocks"] = node.blocks;
      row["stored"] = node.stored;
      row["dense"] = node.dense;
      rows.append(row);
    }
    return rows;
  });
  m.def("tape", [](const Tensors& outputs, const Tensors& inputs) {
    return released([&] { return wengert::tape::to_string(wengert::tape::capture(outputs, inputs, false)); });
  });
  m.def(
      "readers",
      [] {
        const auto kinds = [](const wengert::tape::Table& table) {
          py::dict kind_of;
          for (const auto& [type, row] : table.rows()) kind_of[row.name] = wengert::tape::name(row.op);
          return kind_of;
        };
        py::list reasons;
        for (const wengert::tape::OpaqueReason& reason : wengert::tape::opaque_reasons())
          reasons.append(py::make_tuple(reason.why, reason.nodes));
        return py::make_tuple(kinds(wengert::tape::table()), kinds(wengert::tape::complex_table()), reasons);
      },
      "The kinds of the nodes that have a row, of those of complex values, and [(reason, nodes)] of those without.");
  m.def("plan", [](const Tensors& outputs, const Tensors& inputs, const std::string& kind) {
    using accumulate::Seed;
    const Seed seed = kind == "gradient" ? Seed::gradient
                      : kind == "batch"  ? Seed::batch_tied
                      : kind == "vmap"   ? Seed::batch_summed
                                         : Seed::jacobian;
    return released([&] { return accumulate::plan_text(outputs, inputs, seed); });
  });
  m.def(
      "have_other_leaves",
      [](const Tensors& outputs, const Tensors& inputs, const Tensors& attached, std::uint64_t begun) {
        return wengert::tape::have_other_leaves(outputs, inputs, attached, begun);
      },
      py::arg("outputs"), py::arg("inputs"), py::arg("attached"), py::arg("begun"));
  m.def(
      "passes_custom",
      [](const Tensors& outputs, const Tensors& inputs) { return wengert::tape::passes_custom(outputs, inputs); },
      py::arg("outputs"), py::arg("inputs"));
  m.def(
      "passes_hooks", [](const Tensors& outputs, const Tensors& inputs) { return wengert::tape::passes_hooks(outputs, inputs); },
      py::arg("outputs"), py::arg("inputs"));
  m.def("is_older", [](const at::Tensor& tensor, const Tensors& leaves, std::uint64_t begun) {
    return tensor.grad_fn() && wengert::tape::is_older(*tensor.grad_fn(), leaves, begun);
  });
  m.def(
      "versions",
      [](const py::list& objects) {
        py::list found;
        for (const py::handle object : objects) {
          if (!THPVariable_Check(object.ptr())) continue;
          const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
          if (!tensor.is_inference()) found.append(tensor._version());
        }
        return found;
      },
      py::arg("objects"), "How often each of the tensors among the objects was written to.");
  m.def(
      "drop_hooks",
      [](const Tensors& outputs, const Tensors& inputs, std::uint64_t begun) {
        wengert::tape::drop_hooks(outputs, inputs, begun);
      },
      py::arg("outputs"), py::arg("inputs"), py::arg("begun"));
  m.def(
      "composed",
      [](const py::object& function) {
        const wengert::ops::Composing composing;
        return py::object(function());
      },
      py::arg("function"), "What the function returns; what PyTorch's vmap has no rule for is made of what it has rules for.");
  m.def("without_draws", &wengert::bind::without_draws, py::arg("function"),
        "What the function returns; an operator that would draw random numbers raises an error instead.");
  m.def("ends_a_program", &ends_a_program, py::arg("error"), py::arg("handled"),
        "Whether an exception was raised while a KeyboardInterrupt, say, was on its way; but for what was `handled` before.");
  m.def("sequence_number", &at::sequence_number::peek, "That of the next node of this thread.");
  m.def("forget_history", &forget_history, py::arg("tensor"));
  m.def("transform_leaf", &transform_leaf, py::arg("tensor"));
  m.def("attached_leaf", &attached_leaf, py::arg("tensor"), "A tensor of the same values whose gradient goes on to this one.");
  m.def(
      "tether",
      [](const at::Tensor& tensor, const Tensors& to) { return wengert::ops::tether(tensor, accumulate::edges_of(to), {}); },
      py::arg("tensor"), py::arg("to"), "The tensor with a history that leads to others too, with the derivative zero.");
  m.def("are_finite", [](const py::object& tensors) {
    Tensors given;
    for (const py::handle item : tensors) {
      if (!item.is_none()) given.push_back(item.cast<at::Tensor>());
    }
    return wengert::ops::are_finite(given);
  });
  wengert::bind::define_cuda(m.def_submodule("cuda"));
  wengert::bind::define_cuda_static(m.attr("cuda"));
  wengert::bind::define_evaluator(m);
  wengert::bind::define_random_state(m);
  wengert::bind::define_plan_faults(m);
  m.def("counters", &accumulate::counters);
  m.def("reset_counters", &accumulate::reset_counters);
  m.def("cache_bytes", &accumulate::cache_bytes);
  m.def("clear_caches", &accumulate::clear_caches, py::call_guard<py::gil_scoped_release>());
}
