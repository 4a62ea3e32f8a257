//! Takes what has been read, on the thread that called the load: copies it, makes of it what is asked for, hands it over.

use std::any::Any;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use tensorhaul_device::DeviceError;
use tensorhaul_io::{Counts, Done, JobMemory, ReadError};
use tensorhaul_plan::Brought;
use tensorhaul_stage::Filled;

use crate::checksum::{Hashing, Namesakes};
use crate::copies::Copies;
use crate::devices;
use crate::error::{Error, Result};
use crate::external::ExternalMemory;
use crate::fan_out::FanOut;
use crate::gate::Gate;
use crate::handover::{Emit, Ready};
use crate::operations::Operations;
use crate::pipeline::{Message, Transfer};
use crate::prepare::{Prepared, PreparedDevice};
use crate::progress::Progress;
use crate::tensor::{Storage, Tensor};

/// What a transfer's reads have brought so far, and what became of it.
pub(crate) struct Arrivals<'a, 'e> {
    transfer: &'a Transfer<'a>,
    prepared: &'a Prepared,
    gate: &'a Gate,
    hashing: &'a Hashing,
    emit: &'a mut Emit<'e>,
    /// Reads and operations that each tensor still waits for.
    missing: Vec<u32>,
    /// Reads that each operation still waits for.
    missing_sources: Vec<u32>,
    copies: Copies,
    operations: Operations,
    fan_out: FanOut,
    failed: Option<Error>,
    pub(crate) counts: Counts,
    /// When the first copy was seen to be complete.
    pub(crate) first_copy: Option<Instant>,
    progress: Progress,
}

impl<'a, 'e> Arrivals<'a, 'e> {
    pub(crate) fn new(
        transfer: &'a Transfer<'a>,
        prepared: &'a Prepared,
        gate: &'a Gate,
        hashing: &'a Hashing,
        emit: &'a mut Emit<'e>,
    ) -> Arrivals<'a, 'e> {
        let (plan, assignment) = (transfer.plan, transfer.assignment);
        let progress = Progress {
            total_bytes: plan.promised().read_bytes,
            total_tensors: plan.tensors().len() as u64,
            ..Progress::default()
        };
        Arrivals {
            transfer,
            prepared,
            gate,
            hashing,
            emit,
            missing: plan.tensors().iter().map(|tensor| tensor.read_count + tensor.operation_count).collect(),
            missing_sources: plan.operations().iter().map(|operation| operation.read_count).collect(),
            copies: Copies::new(assignment),
            operations: Operations::new(assignment),
            fan_out: FanOut::new(plan, assignment),
            failed: None,
            counts: Counts::default(),
            first_copy: None,
            progress,
        }
    }

    pub(crate) fn take_all(&mut self, messages: &Receiver<Message>) {
        // What has no bytes to wait for.
        for tensor in 0..self.missing.len() {
            if self.missing[tensor] == 0 && self.transfer.plan.tensors()[tensor].copy_of.is_none() {
                self.whole(tensor);
            }
        }
        for number in 0..self.missing_sources.len() as u32 {
            if self.missing_sources[number as usize] == 0 {
                self.make(number);
            }
        }
        loop {
            let message = if self.is_idle() {
                messages.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                messages.recv_timeout(EVENT_POLL)
            };
            match message {
                Ok(Message::Done(done)) => self.done(done),
                Ok(Message::Lost(read, error)) => self.read_failed(read, error),
                Ok(Message::Ended(counts)) => self.counts += counts,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.take_copied();
            self.take_made();
            self.take_fanned_out();
        }
        self.drain();
    }

    /// Tells whether nothing is under way on any device.
    fn is_idle(&self) -> bool {
        self.copies.are_over() && self.operations.are_over() && self.fan_out.is_over()
    }

    pub(crate) fn result(self) -> Result<()> {
        match self.failed {
            Some(error) => Err(error),
            None if self.transfer.cancel.is_cancelled() => Err(Error::cancelled()),
            None => Ok(()),
        }
    }

    fn done(&mut self, done: Done) {
        let Done { read, memory, result } = done;
        if let Err(error) = result {
            return self.read_failed(read, error);
        }
        match memory {
            memory @ (JobMemory::InPlace(_) | JobMemory::Device(_)) => {
                drop(memory);
                self.arrived(read);
            }
            JobMemory::Staging(filling) => {
                let len_bytes = self.transfer.plan.reads()[read as usize].len_bytes();
                self.copy(read, filling.filled(len_bytes as usize));
            }
        }
    }

    /// Queues the copies out of a filled buffer.
    fn copy(&mut self, read: u32, filled: Filled) {
        if self.failed.is_some() {
            return; // The load has failed; the buffer goes back, and nobody needs its bytes.
        }
        let Transfer { plan, assignment, .. } = *self.transfer;
        let started = self.copies.start(read, filled, plan, assignment, self.prepared, &mut self.operations);
        if let Err(error) = started {
            self.fail(error.into());
        }
    }

    /// Takes the reads whose copies are done.
    fn take_copied(&mut self) {
        for owner in 0..self.prepared.devices.len() {
            while let Some((read, over)) = self.copies.next_over(owner, self.prepared) {
                self.copied(read, over);
            }
        }
    }

    /// Takes what is still under way until nothing is. A single device is waited for; of several none is, because another may be done before.
    fn drain(&mut self) {
        let [PreparedDevice { device, .. }] = &*self.prepared.devices else {
            while !self.is_idle() {
                self.take_copied();
                self.take_made();
                self.take_fanned_out();
                thread::sleep(EVENT_POLL);
            }
            return;
        };
        while let Some((read, over)) = self.copies.wait_for_next(0, self.prepared) {
            self.copied(read, over);
        }
        while let Some((number, over)) = self.operations.wait_for_next(0, &**device) {
            self.made(number, over);
        }
    }

    fn copied(&mut self, read: u32, over: std::result::Result<(), DeviceError>) {
        match over {
            Ok(()) => {
                self.first_copy.get_or_insert_with(Instant::now);
                self.arrived(read);
            }
            Err(error) => self.fail(error.into()),
        }
    }

    /// A read's bytes are all in place.
    fn arrived(&mut self, read: u32) {
        let read = &self.transfer.plan.reads()[read as usize];
        self.progress.read_bytes += read.len_bytes();
        for brought in self.transfer.plan.brought(read) {
            match *brought {
                Brought::Tensor(tensor) => self.came(tensor as usize),
                Brought::Operation(number) => {
                    self.missing_sources[number as usize] -= 1;
                    if self.missing_sources[number as usize] == 0 {
                        self.make(number);
                    }
                }
            }
        }
        if let Some(progress) = &self.transfer.options.progress {
            progress(self.progress);
        }
    }

    /// One more of what a tensor waits for is done.
    fn came(&mut self, tensor: usize) {
        self.missing[tensor] -= 1;
        if self.missing[tensor] == 0 {
            self.whole(tensor);
        }
    }

    /// Every source of an operation has arrived: it can begin.
    fn make(&mut self, number: u32) {
        let operation = &self.transfer.plan.operations()[number as usize];
        if operation.len_bytes == 0 {
            self.gate.pass(number);
            return self.came(operation.tensor as usize); // There is nothing to make.
        }
        if self.failed.is_some() || self.transfer.cancel.is_cancelled() {
            return;
        }
        let Transfer { plan, assignment, .. } = *self.transfer;
        match self.operations.start(number, plan, assignment, self.prepared) {
            // Where reads land in the sources' own memory, nothing but the end of the operation keeps them apart.
            Ok(()) if !assignment.lands(assignment.of_operation(number)) => self.gate.pass(number),
            Ok(()) => {}
            Err(error) => self.fail(error.into()),
        }
    }

    /// Takes what operations have made meanwhile.
    fn take_made(&mut self) {
        for (at, prepared) in self.prepared.devices.iter().enumerate() {
            while let Some((number, over)) = self.operations.next_over(at, &*prepared.device) {
                self.made(number, over);
            }
        }
    }

    fn made(&mut self, number: u32, over: std::result::Result<(), DeviceError>) {
        match over {
            Ok(()) => {
                self.gate.pass(number);
                self.came(self.transfer.plan.operations()[number as usize].tensor as usize);
            }
            Err(error) => self.fail(error.into()),
        }
    }

    /// Every byte of a tensor is in place: it goes on to other devices, where there are copies of it, and is handed over behind that.
    fn whole(&mut self, tensor: usize) {
        let copies = self.fan_out.take_copies_of(tensor as u32);
        let mut is_kept = false;
        for copy in copies {
            if self.failed.is_some() || self.transfer.cancel.is_cancelled() {
                return;
            }
            let Transfer { plan, assignment, .. } = *self.transfer;
            if plan.tensors()[copy as usize].len_bytes == 0 {
                self.whole(copy as usize); // There is nothing to copy.
                continue;
            }
            match self.fan_out.start(copy, plan, assignment, self.prepared) {
                Ok(()) => is_kept = true,
                Err(error) => return self.fail(error.into()),
            }
        }
        if !is_kept {
            self.ready(tensor);
        }
    }

    /// Takes the tensors that were copied from device to device meanwhile.
    fn take_fanned_out(&mut self) {
        for (at, prepared) in self.prepared.devices.iter().enumerate() {
            while let Some((tensor, over)) = self.fan_out.next_over(at, &*prepared.device) {
                self.fanned_out(tensor, over);
            }
        }
    }

    fn fanned_out(&mut self, tensor: u32, over: std::result::Result<(), DeviceError>) {
        let Transfer { plan, assignment, .. } = *self.transfer;
        let copy = &plan.tensors()[tensor as usize];
        let source = copy.copy_of.expect("only copies are copied");
        match over {
            Ok(()) => {
                self.whole(tensor as usize);
                if self.fan_out.is_last_of(source) {
                    self.ready(source as usize);
                }
            }
            Err(error) => {
                let device = &self.prepared.devices[assignment.of_arena(copy.place.arena)].device;
                self.fan_out.let_go(source, plan, &**device, self.prepared);
                self.fail(error.into());
            }
        }
    }

    fn ready(&mut self, tensor: usize) {
        if self.failed.is_some() || self.transfer.cancel.is_cancelled() {
            return;
        }
        let plan = self.transfer.plan;
        let placed = &plan.tensors()[tensor];
        let arena = Arc::clone(&self.prepared.arenas[placed.place.arena as usize]);
        let memory: &dyn Any = &*arena;
        let strides = memory.downcast_ref().and_then(ExternalMemory::strides).map(<[u64]>::to_vec);
        let storage = Storage::Arena(plan.device(placed), arena);
        let mut tensor = Tensor::new(
            placed.dtype,
            plan.shape(placed),
            storage,
            placed.place.offset_bytes,
            placed.len_bytes,
        );
        if let Some(strides) = strides {
            tensor = tensor.with_strides(&strides);
        }
        self.progress.ready_tensors += 1;
        let name = plan.name(placed);
        // What a device map names twice is one tensor; ranks have their parts under one name.
        let namesakes = match self.transfer.options.request.device_map {
            Some(_) => Namesakes::Copies,
            None => Namesakes::Parts,
        };
        self.hashing.add(name, namesakes, &tensor);
        (self.emit)(Ready { id: placed.id, name, is_renamed: placed.name.is_some(), tensor });
    }

    fn read_failed(&mut self, read: u32, error: ReadError) {
        self.fail(self.transfer.read_error(read, error));
    }

    /// Keeps the first error and stops the lanes.
    fn fail(&mut self, error: Error) {
        devices::forget_failed(&error);
        self.failed.get_or_insert(error);
        self.transfer.cancel.cancel();
        self.gate.close();
    }
}

/// How long a filled buffer may wait for its device to be asked again; a copy of 4 MiB takes 80 us on PCIe 5.
const EVENT_POLL: Duration = Duration::from_micros(50);
