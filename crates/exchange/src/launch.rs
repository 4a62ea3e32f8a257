//! Which rank this process is, by what its launcher has set.
//!
//! # Source
//! PyTorch, "torchrun (Elastic Launch)", environment variables; Slurm, srun(1), output environment variables; Open MPI,
//! mpirun(1), environment variables; Intel MPI Developer Reference, `MPI_LOCALRANKID` and `MPI_LOCALNRANKS` beside MPICH's `PMI_RANK` and
//! `PMI_SIZE`; MPICH, Hydra's proxy, which sets them, and `PMI_PORT` with `PMI_ID` where it listens at a port; Linux, proc(5), `environ`
//! and `stat`.

use std::fmt;

/// This process's place among the processes of its job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// Its place in the job, from 0.
    pub rank: u32,
    /// Processes of the job.
    pub size: u32,
    /// Its place among those on its node, from 0.
    pub local_rank: u32,
    /// Processes of the job on its node.
    pub local_size: u32,
    /// What tells the job from others on the node, as its processes there all know it.
    pub job: String,
    /// Who launched it.
    pub launcher: &'static str,
}

/// Finds out from the variables that launchers set; `None` where none did. `lookup` gives the value of a variable.
///
/// Of launchers within each other the innermost counts: torchrun, then MPI's own, then Slurm. Slurm sets some of MPICH's variables for the
/// processes that it starts itself; MPICH's launcher is known from it by the places on the node, which only that counts so.
///
/// # Errors
/// [`LaunchError`] when only some of a launcher's variables are set, one is no number, or they contradict each other.
pub fn launched(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Launched>, LaunchError> {
    let variables = Variables { lookup: &|name| lookup(name).filter(|value| !value.is_empty()) };
    for launcher in [torchrun, open_mpi, mpich, slurm] {
        if let Some(launched) = launcher(&variables)? {
            return check(launched).map(Some);
        }
    }
    Ok(None)
}

/// What [`launched`] looks for, as text for people.
pub const LOOKED_FOR: &str = "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE (torchrun), OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK and \
                              _LOCAL_SIZE (Open MPI), SLURM_STEP_ID with SLURM_PROCID, _NTASKS and _LOCALID (srun), PMI_RANK, PMI_SIZE, \
                              MPI_LOCALRANKID and MPI_LOCALNRANKS (MPICH, Intel MPI)";

fn torchrun(variables: &Variables<'_>) -> Result<Option<Launched>, LaunchError> {
    const NAMES: [&str; 4] = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"];
    // WORLD_SIZE and RANK alone are anybody's words.
    if !variables.has("LOCAL_RANK") && !variables.has("LOCAL_WORLD_SIZE") {
        return Ok(None);
    }
    let [rank, size, local_rank, local_size] = variables.numbers("torchrun", NAMES)?;
    let of_job =
        ["TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"];
    let job = variables.joined("torchrun", &of_job);
    Ok(Some(Launched { rank, size, local_rank, local_size, job, launcher: "torchrun" }))
}

fn open_mpi(variables: &Variables<'_>) -> Result<Option<Launched>, LaunchError> {
    const NAMES: [&str; 4] = [
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ];
    if !NAMES.iter().any(|name| variables.has(name)) {
        return Ok(None);
    }
    let [rank, size, local_rank, local_size] = variables.numbers("Open MPI", NAMES)?;
    let job = variables.joined("openmpi", &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"]);
    Ok(Some(Launched { rank, size, local_rank, local_size, job, launcher: "Open MPI" }))
}

fn mpich(variables: &Variables<'_>) -> Result<Option<Launched>, LaunchError> {
    const NAMES: [&str; 4] = ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"];
    let is_of_slurm = variables.has("SLURM_STEP_ID") && !NAMES[2..].iter().all(|name| variables.has(name));
    if is_of_slurm || !NAMES.iter().any(|name| variables.has(name)) {
        return Ok(None);
    }
    let [rank, size, local_rank, local_size] = variables.numbers("MPI", NAMES)?;
    // PMI_ID is the process's own rank. PMI_PORT is a port of the node's proxy, where it listens at one; else it is told by its process.
    let job = match variables.has("PMI_PORT") {
        true => variables.joined("mpi", &["PMI_PORT"]),
        false => format!("mpi-of-process-{}", proxy(NAMES[2])),
    };
    Ok(Some(Launched { rank, size, local_rank, local_size, job, launcher: "MPI" }))
}

fn slurm(variables: &Variables<'_>) -> Result<Option<Launched>, LaunchError> {
    // A batch script has the job's variables, but is no step of it, and no rank.
    if !variables.has("SLURM_STEP_ID") {
        return Ok(None);
    }
    let [rank, size, local_rank, node] =
        variables.numbers("Slurm", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID"])?;
    let names = ["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"];
    let Some(name) = names.into_iter().find(|name| variables.has(name)) else {
        return Err(LaunchError::Missing { launcher: "Slurm", names: vec![names[0]] });
    };
    let text = (variables.lookup)(name).unwrap_or_default();
    let wrong = || LaunchError::NotANumber { name, value: text.clone() };
    let local_size = tasks_of_node(&text, node).ok_or_else(wrong)?;
    let job = variables.joined("slurm", &["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID"]);
    Ok(Some(Launched { rank, size, local_rank, local_size, job, launcher: "Slurm" }))
}

/// Returns the process that launched the ranks of this node: the nearest above this one that was started without a rank's variable. What
/// lies between are shells and other wrappers, which differ from rank to rank. Where the system does not tell, this process's parent.
fn proxy(variable: &str) -> u32 {
    let parent = std::os::unix::process::parent_id();
    let has_rank = |process: &u32| {
        let environment = std::fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
        let is_it =
            |entry: &[u8]| entry.strip_prefix(variable.as_bytes()).is_some_and(|rest| rest.starts_with(b"="));
        environment.split(|byte| *byte == 0).any(is_it)
    };
    let above = |process: &u32| {
        // Behind the name, which is in parentheses and may hold any: the state, then the parent.
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok().filter(|above| *above > 0)
    };
    std::iter::successors(Some(parent), above).find(|process| !has_rank(process)).unwrap_or(parent)
}

/// Returns the tasks on a node, from a list such as `8(x2),4`: 8 on the first two, 4 on the third.
fn tasks_of_node(text: &str, node: u32) -> Option<u32> {
    let mut before: u32 = 0;
    for group in text.split(',') {
        let (tasks, count) = match group.trim().split_once("(x") {
            Some((tasks, count)) => (tasks, count.strip_suffix(')')?.parse().ok()?),
            None => (group.trim(), 1),
        };
        let tasks: u32 = tasks.parse().ok()?;
        before = before.checked_add(count)?;
        if node < before {
            return Some(tasks);
        }
    }
    None
}

fn check(launched: Launched) -> Result<Launched, LaunchError> {
    let Launched { rank, size, local_rank, local_size, launcher, .. } = launched;
    let outside = |what, place, of| LaunchError::Contradiction { launcher, what, place, of };
    if rank >= size {
        return Err(outside("rank", rank, size));
    }
    if local_rank >= local_size {
        return Err(outside("local rank", local_rank, local_size));
    }
    if local_size > size {
        return Err(outside("number of ranks on the node", local_size, size));
    }
    Ok(launched)
}

struct Variables<'l> {
    lookup: &'l dyn Fn(&str) -> Option<String>,
}

impl Variables<'_> {
    fn has(&self, name: &str) -> bool {
        (self.lookup)(name).is_some()
    }

    fn numbers<const N: usize>(
        &self,
        launcher: &'static str,
        names: [&'static str; N],
    ) -> Result<[u32; N], LaunchError> {
        let missing: Vec<_> = names.into_iter().filter(|name| !self.has(name)).collect();
        if !missing.is_empty() {
            return Err(LaunchError::Missing { launcher, names: missing });
        }
        let mut numbers = [0; N];
        for (number, name) in numbers.iter_mut().zip(names) {
            let value = (self.lookup)(name).unwrap_or_default();
            *number = value.trim().parse().map_err(|_| LaunchError::NotANumber { name, value })?;
        }
        Ok(numbers)
    }

    /// Joins what is set of these.
    fn joined(&self, launcher: &str, names: &[&str]) -> String {
        let values = names.iter().filter_map(|name| (self.lookup)(name));
        [launcher.to_owned()].into_iter().chain(values).collect::<Vec<_>>().join("-")
    }
}

/// Variables that do not say which rank this process is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LaunchError {
    /// Some of a launcher's variables are set, and some are not.
    Missing {
        /// Whose.
        launcher: &'static str,
        /// Those that are not.
        names: Vec<&'static str>,
    },
    /// A variable that holds no number, or no list of them.
    NotANumber {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
    },
    /// A place that is not within its number.
    Contradiction {
        /// Whose variables.
        launcher: &'static str,
        /// What place.
        what: &'static str,
        /// The place.
        place: u32,
        /// What it should be within.
        of: u32,
    },
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LaunchError::Missing { launcher, names } => {
                write!(f, "{launcher} has started this process, but {} is not set", names.join(", "))
            }
            LaunchError::NotANumber { name, value } => {
                write!(f, "{name}={value:?} is not what a launcher sets")
            }
            LaunchError::Contradiction { launcher, what, place, of } => {
                write!(f, "the variables of {launcher} contradict each other: {what} {place} of {of}")
            }
        }
    }
}

impl std::error::Error for LaunchError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Launched>, LaunchError> {
        launched(|name| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn places(variables: &[(&str, &str)]) -> (u32, u32, u32, u32, String) {
        let found = of(variables).unwrap().unwrap();
        (found.rank, found.size, found.local_rank, found.local_size, found.job)
    }

    const TORCHRUN: &[(&str, &str)] = &[
        ("RANK", "9"),
        ("WORLD_SIZE", "16"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "8"),
        ("GROUP_RANK", "1"),
        ("TORCHELASTIC_RUN_ID", "none"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn every_launcher_is_understood() {
        assert_eq!(places(TORCHRUN), (9, 16, 1, 8, "torchrun-none-node0-29500-1".to_owned()));
        let slurm = [
            ("SLURM_PROCID", "17"),
            ("SLURM_NTASKS", "20"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_NODEID", "2"),
            ("SLURM_STEP_TASKS_PER_NODE", "8(x2),4"),
            ("SLURM_TASKS_PER_NODE", "99"),
            ("SLURM_JOB_ID", "7"),
            ("SLURM_STEP_ID", "0"),
            ("PMI_RANK", "17"), // Slurm sets some of MPI's own, too.
        ];
        assert_eq!(places(&slurm), (17, 20, 1, 4, "slurm-7-0-2".to_owned()));
        let open_mpi = [
            ("OMPI_COMM_WORLD_RANK", "3"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "3"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
            ("PMIX_NAMESPACE", "prterun-1"),
        ];
        assert_eq!(places(&open_mpi), (3, 4, 3, 4, "openmpi-prterun-1".to_owned()));
        let mpich =
            [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")];
        let parent = format!("mpi-of-process-{}", std::os::unix::process::parent_id());
        assert_eq!(places(&mpich), (0, 2, 0, 2, parent));
    }

    #[test]
    fn mpi_within_a_step_of_slurm_is_who_counts() {
        // One task of Slurm on the node, which launches two ranks there.
        let step = [
            ("SLURM_JOB_ID", "5"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "1"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NODEID", "0"),
            ("SLURM_STEP_TASKS_PER_NODE", "1"),
        ];
        let within = |mpi: &[(&'static str, &'static str)]| of(&[&step, mpi].concat()).unwrap().unwrap();
        let mpich =
            [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1"), ("MPI_LOCALNRANKS", "2")];
        let found = within(&mpich);
        assert_eq!((found.rank, found.size, found.local_rank, found.local_size), (1, 2, 1, 2));
        assert_eq!(found.launcher, "MPI");
        assert_eq!(within(&mpich[..2]).launcher, "Slurm", "which sets these of MPI's for its own");
    }

    #[test]
    fn ranks_of_an_mpi_job_know_it_by_one_name_and_other_jobs_by_others() {
        let of_port = |rank: &str, port: &str| {
            let own = [("PMI_RANK", rank), ("PMI_ID", rank), ("MPI_LOCALRANKID", rank)];
            let common = [("PMI_SIZE", "2"), ("MPI_LOCALNRANKS", "2"), ("PMI_PORT", port)];
            places(&[own, common].concat()).4
        };
        assert_eq!(of_port("0", "node0:4711"), of_port("1", "node0:4711"));
        assert_ne!(of_port("0", "node0:4711"), of_port("0", "node0:4712"));
    }

    #[test]
    fn the_proxy_of_a_rank_is_above_its_wrappers() {
        // A shell with a rank's variable, and in it another process, which asks.
        if let Some(expected) = std::env::var_os("TENSORHAUL_TEST_PROXY") {
            assert_eq!(proxy("MPI_LOCALRANKID").to_string(), expected.to_string_lossy());
            return;
        }
        let test = std::env::current_exe().unwrap();
        let status = std::process::Command::new("sh")
            .args(["-c", "\"$0\" --exact launch::tests::the_proxy_of_a_rank_is_above_its_wrappers; exit $?"])
            .arg(test)
            .env("MPI_LOCALRANKID", "1")
            .env("TENSORHAUL_TEST_PROXY", std::process::id().to_string())
            .stdout(std::process::Stdio::null())
            .status();
        assert!(status.unwrap().success());
    }

    #[test]
    fn nobody_launched_is_none() {
        assert_eq!(of(&[]), Ok(None));
        assert_eq!(of(&[("RANK", "0"), ("WORLD_SIZE", "8")]), Ok(None), "anybody's words");
        assert_eq!(of(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]), Ok(None), "a batch script");
        assert_eq!(of(&[("LOCAL_RANK", "")]), Ok(None), "set to nothing");
    }

    #[test]
    fn half_of_the_variables_is_an_error_that_names_the_others() {
        let error = of(&[("LOCAL_RANK", "0"), ("RANK", "0")]).unwrap_err();
        assert_eq!(
            error,
            LaunchError::Missing { launcher: "torchrun", names: vec!["WORLD_SIZE", "LOCAL_WORLD_SIZE"] }
        );
        let error = of(&[("PMI_RANK", "1"), ("PMI_SIZE", "2")]).unwrap_err().to_string();
        assert!(error.contains("MPI_LOCALRANKID, MPI_LOCALNRANKS is not set"), "{error}");
        let step = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1")];
        assert!(of(&step).unwrap_err().to_string().contains("SLURM_LOCALID"));
    }

    #[test]
    fn contradictions_are_errors_with_their_numbers() {
        let with = |name: &str, value: &str| {
            let changed = |(other, old): &(&'static str, &'static str)| {
                (*other, if *other == name { value.to_owned() } else { (*old).to_owned() })
            };
            let variables: Vec<_> = TORCHRUN.iter().map(changed).collect();
            of(&variables.iter().map(|(name, value)| (*name, value.as_str())).collect::<Vec<_>>())
                .unwrap_err()
        };
        assert!(with("RANK", "16").to_string().ends_with("rank 16 of 16"));
        assert!(with("LOCAL_RANK", "8").to_string().ends_with("local rank 8 of 8"));
        assert!(with("LOCAL_WORLD_SIZE", "17").to_string().contains("17 of 16"));
        assert!(with("RANK", "-1").to_string().starts_with("RANK=\"-1\""));
    }

    #[test]
    fn tasks_of_nodes_are_read_as_slurm_writes_them() {
        for (text, tasks) in [
            ("8", vec![Some(8), None]),
            ("8(x2),4", vec![Some(8), Some(8), Some(4), None]),
            ("1,2(x2)", vec![Some(1), Some(2), Some(2), None]),
            ("8(x", vec![None]),
            ("8(x4294967295),1(x1)", vec![Some(8)]),
            ("", vec![None]),
        ] {
            for (node, tasks) in (0..).zip(tasks) {
                assert_eq!(tasks_of_node(text, node), tasks, "{text:?} {node}");
            }
        }
    }
}
