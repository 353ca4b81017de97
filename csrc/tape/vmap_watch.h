// What torch.func.vmap makes of the operators that run under it.
#pragma once
#include <string>

namespace wengert::tape {

// NOTE [Operators that vmap rewrites]
// A graph recorded below vmap holds what vmap's rules call, not what the function called.  Where an operator's rule calls the
// same operator on the batched tensors, the graph is that of one sample with one more axis.  Where it calls others, derivatives
// may follow another convention (`max()` becomes `max(dim)`, which picks one of equal elements where `max()` splits among them),
// count something twice (`select_scatter` becomes `scatter` of an expanded source), or be lost altogether (a rule written in
// Python).  Where there is no rule, vmap runs the operator once per sample.  In PyTorch's own order, vmap(jacrev(f)), the
// derivative is recorded above vmap, and none of this is seen.
// So operators are watched while a function runs under vmap: what is rewritten has to be known to keep its derivative.

// Watches the operators of this thread until `end_vmap_watch`.
void begin_vmap_watch();

// Why the graph recorded meanwhile cannot stand for PyTorch's derivative, or an empty string.
std::string end_vmap_watch();

}  // namespace wengert::tape
