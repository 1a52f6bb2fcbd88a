//! Counts what a thread has allocated, so that a target can say how much a machine holds.
//!
//! Leaves out who allocated it: whoever wants to know measures before and after. Hazard: what one thread
//! allocates and another one frees is counted wrongly, so an execution stays on its thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
}

/// What this thread has allocated and not given back.
pub(crate) fn live_bytes() -> isize {
    LIVE.get()
}

fn count(bytes: isize) {
    // While a thread ends nobody measures.
    let _ended = LIVE.try_with(|live| live.set(live.get() + bytes));
}

#[expect(
    unsafe_code,
    reason = "there is no safe way to see allocations; everything is passed to the system's"
)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes as isize - layout.size() as isize);
        unsafe { System.realloc(at, layout, bytes) }
    }
}
