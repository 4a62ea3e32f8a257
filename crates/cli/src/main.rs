//! The `tensorhaul` command: parses arguments, calls the library, prints what it says.
//!
//! Exit codes: 0 done, 1 the input is at fault, 2 the command line is, 3 the machine is, 130 interrupted.
//! An error is one line on stderr. With `--json`, stdout holds one JSON object, and nothing on error.
#![forbid(unsafe_code)]

mod arguments;
mod bench;
mod completions;
mod convert;
mod doctor;
mod failure;
mod inspect;
mod interrupt;
mod load;
mod output;
mod plan;
mod progress;
mod quantized;
mod ranks;
mod share;
mod verify;

use std::panic;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::{Failure, Outcome};

/// Loads safetensors checkpoints straight to where they belong, and says what it did.
#[derive(Parser)]
#[command(name = "tensorhaul", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "Examples:
  tensorhaul load examples/models/tiny-llama      read a checkpoint into memory, and print how fast
  tensorhaul inspect org/name                     the tensors of a model in the Hugging Face cache
  tensorhaul convert model out --cast bf16        another dtype, in another folder
  tensorhaul bench                                loads beside what this machine does at best
  tensorhaul doctor                               what this machine can do, and what is in the way

Exit codes: 0 done, 1 the input is at fault, 2 the command line is, 3 the machine is, 130 interrupted.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Inspect(inspect::Inspect),
    Plan(plan::PlanLoad),
    Load(load::Load),
    Verify(verify::Verify),
    Convert(convert::Convert),
    Bench(bench::Measure),
    Doctor(doctor::Examine),
    Completions(completions::Completions),
}

fn main() -> ExitCode {
    failure::print_panics_as_one_line();
    let outcome = panic::catch_unwind(|| {
        let cli = Cli::try_parse().map_err(Failure::of_command_line)?;
        interrupt::exit_at_once()?;
        run(&cli.command)
    });
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => failure.report(),
        Err(_) => ExitCode::from(failure::MACHINE),
    }
}

fn run(command: &Command) -> Outcome {
    match command {
        Command::Inspect(inspect) => inspect.run(),
        Command::Plan(plan) => plan.run(),
        Command::Load(load) => load.run(),
        Command::Verify(verify) => verify.run(),
        Command::Convert(convert) => convert.run(),
        Command::Bench(bench) => bench.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Completions(completions) => completions.run(),
    }
}
