// probe: reads sixteen bytes at an address and writes them sixteen bytes further, whatever the address. It exists to
// show that the simulator sees what the project's kernels never do.
#include "vendor.h"

struct ProbeParams {
  u64 address;
};
static_assert(sizeof(ProbeParams) == 8);

KERNEL(probe, ProbeParams) {
  if (thread_index() == 0)
    store<Vector>(params.address + VECTOR_LEN, load<Vector>(params.address));
}
