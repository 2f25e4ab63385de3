//! The command line: arguments in, exit code out.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::{ctl, doctor, replay, serve, top};

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
    /// Print a man page
    #[command(after_help = "Examples:\n  coiommu man | man -l -\n  coiommu man replay > coiommu-replay.1")]
    Man {
        /// The subcommand that the page is of; without one, the program
        subcommand: Option<String>,
    },
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
        Command::Man { subcommand } => man(subcommand.as_deref()),
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

fn man(subcommand: Option<&str>) -> anyhow::Result<()> {
    let mut program = Cli::command();
    program.build();
    let command = match subcommand {
        None => program,
        Some(name) => match program.find_subcommand(name) {
            Some(command) => command.clone(),
            None => {
                program.error(clap::error::ErrorKind::InvalidValue, format!("there is no subcommand '{name}'")).exit()
            }
        },
    };
    let name = command.get_display_name().unwrap_or(command.get_name()).to_owned();
    let mut page = Vec::new();
    clap_mangen::Man::new(command).title(name).render(&mut page)?;
    io::stdout().write_all(&page)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        Cli::command().debug_assert();
    }
}
