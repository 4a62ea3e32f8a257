//! How a command fails: one line on stderr, and an exit code that says whose move it is.

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::panic;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::error::{ContextKind, ContextValue};
use tensorhaul::{Error, ErrorKind};

use crate::output::printable;

/// What a command returns.
pub(crate) type Outcome = Result<(), Failure>;

/// The input is at fault: missing, malformed, unsupported, or not what its manifest says.
pub(crate) const INPUT: u8 = 1;
/// The command line is at fault.
pub(crate) const COMMAND_LINE: u8 = 2;
/// The machine is at fault: I/O, memory, a device.
pub(crate) const MACHINE: u8 = 3;
/// Interrupted, as shells count it: 128 and the number of SIGINT.
const INTERRUPTED: u8 = 130;

/// Why a command ends early.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Nothing is printed where nobody listens.
    line: Option<String>,
    code: u8,
}

impl Failure {
    /// The input is not what it should be.
    pub(crate) fn of_input(line: String) -> Failure {
        Failure { line: Some(line), code: INPUT }
    }

    /// The command line asks for what cannot be.
    pub(crate) fn of_request(line: &str) -> Failure {
        Failure { line: Some(line.to_owned()), code: COMMAND_LINE }
    }

    /// The machine refuses something.
    pub(crate) fn of_machine(line: String) -> Failure {
        Failure { line: Some(line), code: MACHINE }
    }

    /// The command line cannot be read: what is wrong with it on one line, without the usage. Help and version, which come
    /// this way too, are printed and end the process.
    pub(crate) fn of_command_line(error: clap::Error) -> Failure {
        if !error.use_stderr()
            || error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        {
            error.exit();
        }
        let text = error.render().to_string();
        let is_said =
            |paragraph: &&str| !["Usage:", "For more"].iter().any(|begin| paragraph.starts_with(begin));
        let paragraphs =
            text.trim().trim_start_matches("error: ").split("\n\n").map(str::trim).filter(is_said);
        let joined = |paragraph: &str| paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
        let line = paragraphs.map(joined).collect::<Vec<_>>().join("; ");
        let tip = tip_for_fuse(&error, env::args_os()).map_or_else(String::new, |tip| format!("; {tip}"));
        Failure { line: Some(format!("{line}{tip}; see --help")), code: COMMAND_LINE }
    }

    /// Standard output does not take what is printed. A reader that has seen enough, as `head` has, is no
    /// failure.
    pub(crate) fn of_stdout(error: &io::Error) -> Failure {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure { line: None, code: 0 },
            _ => Failure::of_machine(format!("writing to standard output failed: {error}")),
        }
    }

    /// Prints the line, and returns the code.
    pub(crate) fn report(self) -> ExitCode {
        if let Some(line) = self.line {
            eprint_line(&line);
        }
        ExitCode::from(self.code)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let code = match error.kind() {
            ErrorKind::NotFound | ErrorKind::Malformed | ErrorKind::Unsupported => INPUT,
            ErrorKind::BadRequest => COMMAND_LINE,
            ErrorKind::Cancelled => INTERRUPTED,
            _ => MACHINE,
        };
        Failure { line: Some(error.one_line()), code }
    }
}

/// Makes a panic one line, too; it is a defect of this program, and says so.
pub(crate) fn print_panics_as_one_line() {
    panic::set_hook(Box::new(|info| {
        // One panic often brings others with it, of threads that waited for the first.
        static PRINTED: AtomicBool = AtomicBool::new(false);
        if PRINTED.swap(true, Ordering::Relaxed) {
            return;
        }
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text =
            text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
        let place =
            info.location().map(|place| format!(" ({}:{})", place.file(), place.line())).unwrap_or_default();
        eprint_line(&format!("this is a defect of tensorhaul, please report it: {text}{place}"));
    }));
}

/// The names of --fuse are optional, so that a word behind it stands for itself: where there is a word too many, it may have been for --fuse.
fn tip_for_fuse(error: &clap::Error, args: impl Iterator<Item = OsString>) -> Option<String> {
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(word)) if !word.starts_with('-') => {}
        _ => return None,
    }
    let args: Vec<OsString> = args.collect();
    let behind = args.windows(2).find(|pair| pair[0] == "--fuse").and_then(|pair| pair[1].to_str())?;
    let is_names = behind.split(',').all(|name| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    });
    is_names.then(|| format!("names to fuse stand behind an equals sign: --fuse={behind}"))
}

fn eprint_line(line: &str) {
    // When stderr is closed, the exit code has to do.
    let _ = writeln!(io::stderr(), "error: {}", printable(line));
}
