//! `coiommu man`: manual pages of the program and its subcommands, as roff.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Command;
use clap::error::ErrorKind;
use clap_mangen::roff::{Roff, roman};

/// Print a man page, or write all of them
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  coiommu man | man -l -
  coiommu man ctl unpin > coiommu-ctl-unpin.1
  coiommu man --all /usr/local/share/man/man1")]
pub(crate) struct Args {
    /// The subcommand that the page is of, and one of its own; without one, the program
    subcommand: Vec<String>,

    /// Write the pages of the program and of all its subcommands into a folder
    #[arg(long, value_name = "FOLDER", conflicts_with = "subcommand")]
    all: Option<PathBuf>,
}

/// Prints or writes pages of a program.
pub(crate) fn run(args: &Args, program: Command) -> anyhow::Result<()> {
    let mut program = without_help(program);
    program.build();
    if let Some(folder) = &args.all {
        return write_all(&program, folder);
    }
    let mut command = &program;
    for name in &args.subcommand {
        let Some(found) = command.find_subcommand(name) else {
            let message = format!("there is no subcommand '{}'", args.subcommand.join(" "));
            program.error(ErrorKind::InvalidValue, message).exit()
        };
        command = found;
    }
    io::stdout().write_all(&page(command)?)?;
    Ok(())
}

/// The program without the subcommands that say what `--help` says: they have no pages.
fn without_help(command: Command) -> Command {
    command.disable_help_subcommand(true).mut_subcommands(without_help)
}

fn write_all(command: &Command, folder: &Path) -> anyhow::Result<()> {
    let path = folder.join(format!("{}.1", name(command)));
    fs::write(&path, page(command)?).with_context(|| format!("cannot write {}", path.display()))?;
    command.get_subcommands().try_for_each(|subcommand| write_all(subcommand, folder))
}

/// What a page is called: `coiommu-ctl-unpin`.
fn name(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

fn page(command: &Command) -> io::Result<Vec<u8>> {
    let man = clap_mangen::Man::new(command.clone())
        .title(name(command))
        // Nothing would shift what comes after it to its place.
        .date(" ")
        .source(concat!("coiommu ", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    if let Some(notes) = command.get_after_long_help().or_else(|| command.get_after_help()) {
        // Examples and tables: lines as they are.
        let mut section = Roff::new();
        section.control("SH", ["NOTES"]).control("nf", []);
        for line in notes.to_string().lines() {
            section.text([roman(line)]);
        }
        section.control("fi", []).to_writer(&mut page)?;
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    /// The pages, by their names.
    fn pages() -> Vec<(String, String)> {
        let folder = tempfile::tempdir().unwrap();
        let args = Args { subcommand: Vec::new(), all: Some(folder.path().to_owned()) };
        run(&args, Cli::command()).unwrap();
        let file = |entry: io::Result<fs::DirEntry>| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(&path).unwrap())
        };
        fs::read_dir(folder.path()).unwrap().map(file).collect()
    }

    #[test]
    fn every_page_that_a_page_names_is_there() {
        let pages = pages();
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        for expected in ["coiommu.1", "coiommu-serve.1", "coiommu-ctl.1", "coiommu-ctl-unpin.1", "coiommu-man.1"] {
            assert!(names.contains(&expected), "{names:?}");
        }
        let mut referred = 0;
        for (page, text) in &pages {
            for line in text.lines().filter_map(|line| line.strip_suffix("(1)")) {
                let name = format!("{}.1", line.replace("\\-", "-"));
                assert!(names.contains(&name.as_str()), "{page} names {name}");
                referred += 1;
            }
        }
        assert_eq!(referred, pages.len() - 1, "each but the program's own");
    }

    #[test]
    fn examples_keep_their_lines() {
        let pages = pages();
        let (_, serve) = pages.iter().find(|(name, _)| name == "coiommu-serve.1").unwrap();
        let (_, notes) = serve.split_once(".SH NOTES\n.nf\nExamples:\n  coiommu serve ").unwrap();
        assert!(notes.contains("\nExit codes: ") && notes.ends_with("\n.fi\n"), "{notes}");
        // The program's version, where a reader looks for it, and nothing where a date would be.
        assert!(
            serve.contains(concat!(".TH coiommu-serve 1 \" \" \"coiommu ", env!("CARGO_PKG_VERSION"), "\"")),
            "{serve}"
        );
    }
}
