//! `tensorhaul completions`: a script that completes this command's arguments in a shell.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::Cli;
use crate::failure::Outcome;
use crate::output::print;

/// Print a script for a shell that completes commands and flags
#[derive(Args)]
#[command(after_help = "Examples:
  tensorhaul completions bash > ~/.local/share/bash-completion/completions/tensorhaul
  tensorhaul completions zsh  > ~/.zfunc/_tensorhaul
  tensorhaul completions fish > ~/.config/fish/completions/tensorhaul.fish")]
pub(crate) struct Completions {
    /// The shell
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(&self) -> Outcome {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "tensorhaul", &mut script);
        print(String::from_utf8_lossy(&script))
    }
}
