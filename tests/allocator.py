"""What torch's allocator recorded."""

import gc

from torch.profiler import ProfilerActivity, profile


def allocated(call):
    """The most bytes allocated at once while it runs, by the allocator's record."""
    gc.collect()  # what another test left must not be freed meanwhile, and count as less
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top
