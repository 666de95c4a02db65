"""Bytes that the allocator of the CPU gives out, for the tests of workspaces."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function, mapped=None):
    """What the allocator of the CPU had given out at most while `function` ran, and still at its end; without files of
    `mapped` bytes, which it counts when they are mapped."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes() if abs(event.nbytes()) != mapped else 0
        peak = max(peak, live)
    return peak, live
