//! The command line: arguments in, exit code out.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::{ctl, doctor, man, replay, serve, top};

/// Pass devices through to VMs without pinning all of their memory.
#[derive(Debug, Parser)]
#[command(name = "coiommu", version, propagate_version = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Replay(replay::Args),
    Doctor(doctor::Args),
    Serve(serve::Args),
    Ctl(ctl::Args),
    Top(top::Args),
    /// Print a completion script for a shell
    #[command(after_help = "Example: coiommu completions bash > /etc/bash_completion.d/coiommu")]
    Completions {
        /// The shell
        shell: Shell,
    },
    Man(man::Args),
}

/// Runs the program with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Replay(args) => replay::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Ctl(args) => ctl::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "coiommu", &mut script);
            io::stdout().write_all(&script).map_err(Into::into)
        }
        Command::Man(args) => man::run(&args, Cli::command()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads the output has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Nothing can be done where this cannot be written either.
            let _ = writeln!(io::stderr(), "coiommu: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        Cli::command().debug_assert();
    }
}
