// Whether a plan stays within its slots, decided from its metadata alone.
#pragma once
#include <string>

#include "blocks/plan.h"

namespace wengert::blocks {

// The first thing wrong with the plan, in words; empty for a sound one.  Sound is a plan of which, for all values of all loops,
//   - every read and target has a coordinate per axis of its slot, and each lies within that axis,
//   - every slot is written before it is read, the caller's are never written, and what is not filled with zeros first is stored
//     to in every place,
//   - sums are stored along the loops that are left, and shapes of whole slots fit the steps that make or take them.
// What indices hold is data: the steps that use them check it when they run.
std::string violation(const Plan& plan);

}  // namespace wengert::blocks
