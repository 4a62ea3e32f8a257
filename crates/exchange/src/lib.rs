//! Ranks of one node that hand bytes of device memory to each other.
//!
//! An [`Exchange`] moves messages between the devices of ranks, all of a round at once. [`Nccl`] does so over the devices' links, by
//! NVIDIA's NCCL or AMD's RCCL, loaded at run time; [`Sockets`] between processes by way of the host, wherever there are sockets;
//! [`InProcess`] between threads of one process, from device to device. Which ranks there are, launchers have said already
//! ([`launch`]); ranks of a node find each other at a socket ([`Control`]), over which they also agree on what they do and tell each
//! other when they fail.
//!
//! This crate starts no process, and nothing of it crosses a node.

mod by_host;
mod control;
mod error;
mod in_process;
pub mod launch;
mod nccl;
mod nccl_init;
mod nccl_sys;
mod sockets;

use std::sync::Arc;
use std::time::Duration;

use tensorhaul_device::{Device, Location, Stream};

pub use control::{Control, RENDEZVOUS_VARIABLE, Rendezvous};
pub use error::ExchangeError;
pub use in_process::InProcess;
pub use launch::{LaunchError, Launched};
pub use nccl::{NCCL_LIBRARY_VARIABLE, Nccl, RCCL_LIBRARY_VARIABLE, Vendor};
pub use sockets::Sockets;

/// One rank's end of what connects the ranks of a node.
///
/// Calls of [`agree`](Exchange::agree) and [`exchange`](Exchange::exchange) are made by one thread at a time, and match on all ranks: as many, in
/// the same order. Dropping it when its exchanges are complete leaves the others undisturbed.
pub trait Exchange: Send + Sync {
    /// Returns this rank's place on the node, from 0.
    fn rank(&self) -> u32;

    /// Returns the number of ranks.
    fn size(&self) -> u32;

    /// Returns what moves the bytes, as reports name it.
    fn name(&self) -> String;

    /// Returns what could not be done as preferred so far: what was done instead, and why.
    fn fallbacks(&self) -> Vec<(String, String)>;

    /// Returns how long a rank waits for others before it takes them for lost.
    fn timeout(&self) -> Duration;

    /// Waits until every rank has called this, and checks that all came with the same number: a fingerprint of what they are about
    /// to do.
    ///
    /// # Errors
    /// [`ExchangeError::Disagree`] on every rank when the numbers differ; [`ExchangeError::PeerLost`] and
    /// [`ExchangeError::TimedOut`] when a rank does not come.
    fn agree(&self, fingerprint: u64) -> Result<(), ExchangeError>;

    /// Queues the messages of one round on a stream of this rank's device. Messages between two ranks are matched in their order, and must
    /// agree in length on both sides. No order among different peers is asked for: all of a round's messages are one group, so that no
    /// rank waits for another's next call. A rank without messages in a round need not call.
    ///
    /// It returns when the messages are queued or complete. They are complete when an event recorded behind them on the stream is.
    ///
    /// # Errors
    /// [`ExchangeError`]; some of the messages may then still be under way until [`abort`](Exchange::abort) has returned and the stream was
    /// waited for.
    ///
    /// # Safety
    /// - Every message is in an allocation of the device, the same one in all calls, and inside it.
    /// - Until an event recorded behind it on the stream is complete, nobody writes what is sent, and nobody touches what is received.
    unsafe fn exchange(
        &self,
        device: &Arc<dyn Device>,
        stream: Stream,
        sends: &[Message<'_>],
        receives: &[Message<'_>],
    ) -> Result<(), ExchangeError>;

    /// Tells whether all peers are still there, without waiting. To be asked while an event behind an exchange is waited for: an exchange with
    /// a rank that is gone never completes by itself.
    ///
    /// # Errors
    /// [`ExchangeError::PeerLost`] when one is not, or the exchange was aborted.
    fn check(&self) -> Result<(), ExchangeError>;

    /// Ends what is under way, so that streams run dry, and tells the peers, whose [`check`](Exchange::check) then fails. What was being
    /// received is undefined. The exchange is of no more use.
    fn abort(&self);
}

/// Bytes of device memory on their way to or from a peer.
#[derive(Clone, Copy)]
pub struct Message<'m> {
    /// The other rank.
    pub peer: u32,
    /// The first byte.
    pub start: Location<'m>,
    /// Number of bytes; not 0.
    pub len_bytes: u64,
}
