//! Operations under way: started when their sources are there, over when their event is.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use tensorhaul_device::dequantize::{Layout, Output};
use tensorhaul_device::{Dequantize, Device, DeviceError, Event, Location, Operation, Source, Stream};
use tensorhaul_plan::Plan;

use crate::assignment::Assignment;
use crate::prepare::Prepared;

/// The operations of one transfer.
pub(crate) struct Operations {
    /// For each device, operations and the events behind them, oldest first: one stream works them off in this order.
    running: Vec<VecDeque<(u32, Arc<Event>)>>,
    /// For each operation, the point behind it, until the copy stream was told to wait for it.
    unordered: Vec<Option<Arc<Event>>>,
}

type Over = Result<(), DeviceError>;

impl Operations {
    pub(crate) fn new(assignment: &Assignment) -> Operations {
        let running = assignment.devices().iter().map(|_| VecDeque::new()).collect();
        Operations { running, unordered: assignment.operations().iter().map(|_| None).collect() }
    }

    /// Tells whether none is under way.
    pub(crate) fn are_over(&self) -> bool {
        self.running.iter().all(VecDeque::is_empty)
    }

    /// Queues an operation whose sources have all arrived.
    pub(crate) fn start(
        &mut self,
        number: u32,
        plan: &Plan,
        assignment: &Assignment,
        prepared: &Prepared,
    ) -> Over {
        let (at, arenas) = (assignment.of_operation(number), &prepared.arenas);
        let device = &prepared.devices[at].device;
        let operation = &plan.operations()[number as usize];
        let dtype = plan.tensors()[operation.tensor as usize].dtype;
        let location = |place: tensorhaul_plan::Place| Location {
            allocation: &arenas[place.arena as usize],
            offset_bytes: place.offset_bytes,
        };
        let source = |source: &tensorhaul_plan::Source| Source {
            role: source.role,
            start: location(source.place),
            len_bytes: source.len_bytes,
        };
        let sources: Vec<_> = operation.sources.iter().map(source).collect();
        let layout = if operation.is_transposed { Layout::Columns } else { Layout::Rows };
        let dequantize = Dequantize {
            recipe: &operation.recipe,
            sources: &sources,
            target: location(operation.place),
            output: Output { dtype, layout },
        };
        // SAFETY: the arenas live until the transfer is over, which waits for the event below. The sources are whole: the
        // events of their copies were seen complete; nobody writes there again before this operation is over, which is what
        // the plan's `after` says; nobody else knows of the target yet.
        unsafe { device.run(&Operation::Dequantize(dequantize), Stream::Compute)? };
        let over = match device.record(Stream::Compute) {
            Ok(event) => Arc::new(event),
            Err(error) => {
                // It is queued, and nothing marks its end: the stream is drained before the target may go back to its owner.
                let _ = device.record(Stream::Compute).and_then(|event| device.wait(&event));
                return Err(error);
            }
        };
        self.running[at].push_back((number, Arc::clone(&over)));
        self.unordered[number as usize] = Some(over);
        Ok(())
    }

    /// Makes copies to a device wait from now on for those of these operations that are of it: their sources lie where the copies land. All have
    /// been started.
    pub(crate) fn order_copies(
        &mut self,
        after: &Range<u32>,
        assignment: &Assignment,
        at: usize,
        device: &dyn Device,
    ) -> Over {
        for number in after.clone().filter(|number| assignment.of_operation(*number) == at) {
            if let Some(event) = self.unordered[number as usize].take() {
                device.order(Stream::Copy, &event)?;
            }
        }
        Ok(())
    }

    /// Takes a device's oldest operation out, if it is over, with whether it went well.
    pub(crate) fn next_over(&mut self, at: usize, device: &dyn Device) -> Option<(u32, Over)> {
        let (_, event) = self.running[at].front()?;
        let over = match device.is_complete(event) {
            Ok(false) => return None,
            Ok(true) => Ok(()),
            Err(error) => Err(error),
        };
        self.running[at].pop_front().map(|(number, _)| (number, over))
    }

    /// Waits for a device's oldest operation, if there is one.
    pub(crate) fn wait_for_next(&mut self, at: usize, device: &dyn Device) -> Option<(u32, Over)> {
        let (number, event) = self.running[at].pop_front()?;
        Some((number, device.wait(&event)))
    }
}
