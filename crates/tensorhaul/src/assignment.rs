//! How the work of a load is assigned to its devices: which reads, operations and staging memory are whose.

use tensorhaul_plan::{Copy, DeviceId, Plan, Read, Staged, Target};

/// What of a plan is which device's.
///
/// Devices are numbered by their place here wherever a load keeps something for each. A read is the work of one of them, with
/// its lane and its staging ring, also where its bytes go to several; so every device's link has a ring of its own to be fed from, and none
/// waits for bytes of another that stand before its own in the files.
pub(crate) struct Assignment {
    /// Ascending.
    devices: Vec<DeviceId>,
    /// For each arena, its device.
    of_arena: Vec<usize>,
    /// For each read, whose work it is.
    of_read: Vec<usize>,
    /// For each operation, where it runs.
    of_operation: Vec<usize>,
    /// For each device, whether reads land in its memory, without a stop in the ring.
    lands: Vec<bool>,
    /// For each device, what goes through its ring.
    staged: Vec<Staged>,
}

impl Assignment {
    /// Assigns a plan whose tensors all go to one device.
    pub(crate) fn of_one(device: DeviceId, plan: &Plan) -> Assignment {
        Assignment::of_devices(vec![device], plan)
    }

    /// Assigns a plan among the devices that its tensors go to; among none but the host where there are no tensors.
    pub(crate) fn new(plan: &Plan) -> Assignment {
        let devices = plan.devices();
        Assignment::of_devices(if devices.is_empty() { vec![DeviceId::Host] } else { devices }, plan)
    }

    /// Assigns a plan whose reads are all the work of one device, whosever their bytes are.
    pub(crate) fn of_reader(device: DeviceId, plan: &Plan) -> Assignment {
        Assignment {
            devices: vec![device],
            of_arena: vec![0; plan.arenas().len()],
            of_read: vec![0; plan.reads().len()],
            of_operation: vec![0; plan.operations().len()],
            lands: vec![false],
            staged: vec![plan.staged()],
        }
    }

    fn of_devices(devices: Vec<DeviceId>, plan: &Plan) -> Assignment {
        let count = devices.len();
        let number = |device: &DeviceId| devices.binary_search(device);
        let number = |device| number(device).expect("a plan's arenas are on its devices");
        let of_arena: Vec<_> = plan.arenas().iter().map(|arena| number(&arena.device)).collect();
        let operations = plan.operations().iter();
        let of_operation = operations.map(|operation| of_arena[operation.place.arena as usize]).collect();
        let mut assignment = Assignment {
            devices,
            of_arena,
            of_read: Vec::with_capacity(plan.reads().len()),
            of_operation,
            lands: vec![false; count],
            staged: vec![Staged::default(); count],
        };
        for read in plan.reads() {
            let owner = match &read.target {
                Target::InPlace(place) => {
                    let owner = assignment.of_arena[place.arena as usize];
                    assignment.lands[owner] = true;
                    owner
                }
                Target::Staged { .. } => {
                    let owner = assignment.owner(plan.copies(read));
                    let staged = &mut assignment.staged[owner];
                    staged.reads += 1;
                    staged.read_len_bytes_max = staged.read_len_bytes_max.max(read.len_bytes());
                    owner
                }
            };
            assignment.of_read.push(owner);
        }
        assignment
    }

    /// Returns the device that a staged read is the work of: the first that it feeds, and the host only where it feeds nobody else,
    /// because the host copies from any memory, and devices only from what one of them has pinned.
    fn owner(&self, copies: &[Copy]) -> usize {
        if self.devices.len() == 1 {
            return 0;
        }
        let fed = || copies.iter().map(|copy| self.of_arena(copy.target.arena));
        let is_accelerator = |device: &usize| self.devices[*device] != DeviceId::Host;
        fed().filter(is_accelerator).min().or(fed().min()).unwrap_or(0)
    }

    /// Returns the devices, ascending.
    pub(crate) fn devices(&self) -> &[DeviceId] {
        &self.devices
    }

    /// Returns whose an arena is.
    pub(crate) fn of_arena(&self, arena: u32) -> usize {
        self.of_arena[arena as usize]
    }

    /// Returns whose work a read is.
    pub(crate) fn of_read(&self, read: u32) -> usize {
        self.of_read[read as usize]
    }

    /// Returns where an operation runs.
    pub(crate) fn of_operation(&self, operation: u32) -> usize {
        self.of_operation[operation as usize]
    }

    /// Returns where each operation runs.
    pub(crate) fn operations(&self) -> &[usize] {
        &self.of_operation
    }

    /// Returns the devices that a read feeds, ascending.
    pub(crate) fn fed_by(&self, plan: &Plan, read: &Read) -> Vec<usize> {
        if self.devices.len() == 1 {
            return vec![0];
        }
        if let Target::InPlace(place) = read.target {
            return vec![self.of_arena(place.arena)];
        }
        let mut fed: Vec<_> = plan.copies(read).iter().map(|copy| self.of_arena(copy.target.arena)).collect();
        fed.sort_unstable();
        fed.dedup();
        fed
    }

    /// Tells whether reads land in a device's own memory.
    pub(crate) fn lands(&self, device: usize) -> bool {
        self.lands[device]
    }

    /// Returns what goes through a device's ring.
    pub(crate) fn staged(&self, device: usize) -> Staged {
        self.staged[device]
    }

    /// Returns how many devices have reads, which is among how many the machine's threads are divided.
    pub(crate) fn reading_count(&self) -> usize {
        let reads = |device: &usize| self.lands(*device) || self.staged(*device).reads > 0;
        (0..self.devices.len()).filter(reads).count().max(1)
    }
}
