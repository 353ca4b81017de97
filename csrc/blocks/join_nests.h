// Joins loop nests of a plan, once it is complete: values that were computed into memory because several others need them stay in
// registers where all of those run over the same loops.
#pragma once
#include "blocks/plan.h"

namespace wengert::blocks {

void join_nests(Plan& plan, const Abilities& abilities);

}  // namespace wengert::blocks
