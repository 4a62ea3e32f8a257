//! What the benches share: checkpoints to load, the page cache's state, what a run costs, and the
//! ceilings it is held against.
//!
//! The ceilings are written by hand against the system, not with this project's engines: a fault that
//! both had would otherwise not show.

pub mod cache;
pub mod ceiling;
pub mod checkpoint;
pub mod machine;
pub mod memory;
pub mod meter;
pub mod simulator;
pub mod statistics;
