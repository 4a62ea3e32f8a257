//! What the simulated machine is like.

/// Settings as `key=value` pairs, separated by `;`: `devices=2;memory=1048576;fail=cuEventRecord:3:700`.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// `devices`: how many there are. Default: 1.
    pub(crate) devices: u32,
    /// `memory`: bytes of each device. Default: 1 GiB.
    pub(crate) memory_bytes: u64,
    /// `delay_us`: the longest time that queued work waits before it runs; each waits a part of it, from the seed. Default: 0.
    pub(crate) delay_us: u64,
    /// `delay_us_of=DEVICE:MICROSECONDS`: the same for one device, by its ordinal. May repeat.
    pub(crate) delays_us: Vec<(usize, u64)>,
    /// `seed`: where the dice start. Default: 1.
    pub(crate) seed: u64,
    /// `link_mb_per_s`: speed of the host link of each device, in 1e6 bytes a second; 0 for no limit. Default: 0.
    pub(crate) link_mb_per_s: u64,
    /// `fail=CALL:N:CODE`: the N-th use of CALL (from 1) returns CODE. Codes from 700 to 719 lose the device. May repeat.
    pub(crate) fails: Vec<Fail>,
    /// `slow=CALL:MILLISECONDS`: every use of CALL takes that long before it does anything, or until [`simgpu_fail`] sets
    /// the machine anew. May repeat.
    ///
    /// [`simgpu_fail`]: crate::control::simgpu_fail
    pub(crate) slows: Vec<Slow>,
    /// `flip=CALL:N`: what the N-th use of CALL (from 1) copies arrives with its first bit wrong. May repeat.
    pub(crate) flips: Vec<(String, u64)>,
    /// `poison=0`: device memory is not written over when it is allocated and freed, which takes longer than any driver. Default: 1.
    pub(crate) poison: bool,
    /// `pools=0`: the device has no stream-ordered allocator. Default: 1.
    pub(crate) pools: bool,
    /// `unified=0`: the device does not reach pinned host memory by its address. Default: 1.
    pub(crate) unified: bool,
    /// `host_node=NODE`: the host's memory node that drivers name for every device. Default: they do not know.
    pub(crate) host_node: Option<u32>,
    /// `integrated=1`: the device says that it shares the host's memory, and copies work there too. Default: 0.
    pub(crate) integrated: bool,
    /// `batches=0`: the driver refuses batched copies. Default: 1.
    pub(crate) batches: bool,
    /// `peers=0`: no device reaches another's memory. Default: 1, each can be let to.
    pub(crate) peers: bool,
    /// `no_peer=DEVICE:PEER`: a device, by its ordinal, does not reach another's memory, though perhaps the other way round.
    /// May repeat.
    pub(crate) no_peers: Vec<(usize, usize)>,
    /// `capturing=1`: somebody in this process captures a stream. Calls that would end the capture, from threads whose
    /// capture mode is not relaxed, are violations. Default: 0.
    pub(crate) capturing: bool,
    /// `nccl`: the version that the communication library says it is. Default: 22703.
    pub(crate) nccl: u32,
    /// `gfx`: the architecture that HIP names, with its features as HIP writes them. Default: `gfx942:sramecc+:xnack-`.
    pub(crate) gfx: String,
    /// `direct=0`: storage cannot write into devices, as without a kernel that lets it; libraries for it fall back where they may.
    /// Default: 1.
    pub(crate) direct: bool,
    /// `direct_p2pdma=1`: cuFile has no nvidia-fs, and writes into devices only where it is told to use the kernel's P2PDMA. Default: 0.
    pub(crate) direct_p2pdma: bool,
    /// `direct_parameters=0`: cuFile has no parameters, as in old releases. Default: 1.
    pub(crate) direct_parameters: bool,
    /// `direct_insists=1`: cuFile takes the setting that forbids compatibility mode, and stays in it. Default: 0.
    pub(crate) direct_insists: bool,
    /// `direct_short=N`: every N-th direct read brings about half of what is asked for; 0 for none. Default: 0.
    pub(crate) direct_short: u64,
    /// `direct_batch=N`: cuFile takes so many reads in a batch, and sets up none for more. Default: 128.
    pub(crate) direct_batch: u32,
    /// `direct_told=STATUS:N`: the first N times that reads in batches are asked for, the first of them is told with this status, though it
    /// goes on. Default: what is told is over.
    pub(crate) direct_told: (i32, u64),
    /// `forward=LIBRARY`: HIP's calls run on this CUDA driver, by its path or its name; nothing behind the `=` means
    /// `libcuda.so.1`. Default: they run on the machine.
    pub(crate) forward: Option<String>,
}

/// One call that fails.
#[derive(Clone, Debug)]
pub(crate) struct Fail {
    pub(crate) call: String,
    pub(crate) nth: u64,
    pub(crate) code: i32,
}

/// One call that takes its time.
#[derive(Clone, Debug)]
pub(crate) struct Slow {
    pub(crate) call: String,
    pub(crate) millis: u64,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            devices: 1,
            memory_bytes: 1 << 30,
            delay_us: 0,
            delays_us: Vec::new(),
            seed: 1,
            link_mb_per_s: 0,
            fails: Vec::new(),
            slows: Vec::new(),
            flips: Vec::new(),
            poison: true,
            pools: true,
            unified: true,
            host_node: None,
            integrated: false,
            batches: true,
            peers: true,
            no_peers: Vec::new(),
            capturing: false,
            nccl: 22_703,
            gfx: "gfx942:sramecc+:xnack-".to_owned(),
            direct: true,
            direct_p2pdma: false,
            direct_parameters: true,
            direct_insists: false,
            direct_short: 0,
            direct_batch: 128,
            direct_told: (0, 0),
            forward: None,
        }
    }
}

impl Config {
    /// Parses settings; the error names the pair that is not one.
    pub(crate) fn parse(text: &str) -> Result<Config, String> {
        let mut config = Config::default();
        for pair in text.split(';').map(str::trim).filter(|pair| !pair.is_empty()) {
            let wrong = || format!("simgpu: {pair:?} is no setting");
            let (key, value) = pair.split_once('=').ok_or_else(wrong)?;
            let number = || value.parse::<u64>().map_err(|_| wrong());
            match key {
                "devices" => config.devices = number()? as u32,
                "memory" => config.memory_bytes = number()?,
                "delay_us" => config.delay_us = number()?,
                "seed" => config.seed = number()?,
                "link_mb_per_s" => config.link_mb_per_s = number()?,
                "poison" => config.poison = number()? != 0,
                "pools" => config.pools = number()? != 0,
                "unified" => config.unified = number()? != 0,
                "host_node" => config.host_node = Some(number()? as u32),
                "integrated" => config.integrated = number()? != 0,
                "batches" => config.batches = number()? != 0,
                "peers" => config.peers = number()? != 0,
                "direct" => config.direct = number()? != 0,
                "direct_p2pdma" => config.direct_p2pdma = number()? != 0,
                "direct_parameters" => config.direct_parameters = number()? != 0,
                "direct_insists" => config.direct_insists = number()? != 0,
                "direct_short" => config.direct_short = number()?,
                "direct_batch" => config.direct_batch = number()? as u32,
                "direct_told" => {
                    let (status, count) = value.split_once(':').ok_or_else(wrong)?;
                    let status = status.parse().map_err(|_| wrong())?;
                    config.direct_told = (status, count.parse().map_err(|_| wrong())?);
                }
                "capturing" => config.capturing = number()? != 0,
                "nccl" => config.nccl = number()? as u32,
                "gfx" => config.gfx = value.to_owned(),
                "forward" => {
                    let library = if value.is_empty() { CUDA_LIBRARY } else { value };
                    config.forward = Some(library.to_owned());
                }
                "fail" => {
                    let parts: Vec<&str> = value.split(':').collect();
                    let &[call, nth, code] = parts.as_slice() else { return Err(wrong()) };
                    let (nth, code) = (nth.parse().map_err(|_| wrong())?, code.parse().map_err(|_| wrong())?);
                    config.fails.push(Fail { call: call.to_owned(), nth, code });
                }
                "no_peer" => {
                    let (device, peer) = value.split_once(':').ok_or_else(wrong)?;
                    let pair = (device.parse().map_err(|_| wrong())?, peer.parse().map_err(|_| wrong())?);
                    config.no_peers.push(pair);
                }
                "flip" => {
                    let (call, nth) = value.split_once(':').ok_or_else(wrong)?;
                    config.flips.push((call.to_owned(), nth.parse().map_err(|_| wrong())?));
                }
                "delay_us_of" => {
                    let (device, delay_us) = value.split_once(':').ok_or_else(wrong)?;
                    let one = (device.parse().map_err(|_| wrong())?, delay_us.parse().map_err(|_| wrong())?);
                    config.delays_us.push(one);
                }
                "slow" => {
                    let (call, millis) = value.split_once(':').ok_or_else(wrong)?;
                    let millis = millis.parse().map_err(|_| wrong())?;
                    config.slows.push(Slow { call: call.to_owned(), millis });
                }
                _ => return Err(wrong()),
            }
        }
        Ok(config)
    }
}

/// As NVIDIA's driver installs it.
const CUDA_LIBRARY: &str = "libcuda.so.1";
