"""Bytes that the allocator of the CPU gives out, for the tests of workspaces."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function, mapped=None):
    """Return the most that the CPU's allocator had given out while `function` ran, and what it still had at its end.

    Files of `mapped` bytes, which it counts when they are mapped, are left out.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes() if abs(event.nbytes()) != mapped else 0
        peak = max(peak, live)
    return peak, live
