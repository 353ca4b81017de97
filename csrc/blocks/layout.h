// In which order the arrays that a plan makes lie in memory: as the arrays they are computed with do, so that nests run along
// rows.
#pragma once
#include <span>
#include <vector>

#include "blocks/plan.h"

namespace wengert::blocks {

// Per loop: how far one turn moves a window of the slot through memory, in elements.
std::vector<std::int64_t> memory_steps(const Slot& slot, const std::vector<Affine>& axes, std::size_t loops);

// Sorts loops, outer ones first, as the largest of the operands lies; of equally large ones as most of them do, those apart that
// are `turnable`.  An operand that does not move along a loop leaves it to the next one.
void sort_by_memory(const std::vector<Slot>& slots, const std::vector<bool>& turnable, std::span<const Read> operands,
                    std::vector<std::size_t>& loops);

// Turns what the steps of a complete plan make, so that those who read it run along its rows.  A matrix product can lie either
// way, as (b^T a^T)^T; a nest runs as most of its arrays lie.  What was copied only to be turned is then made in its place.
void orient(Plan& plan);

}  // namespace wengert::blocks
