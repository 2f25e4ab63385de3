//! Paths that the user names: relative to where they stand, while tasks run in the folder of the workspace.

use std::path::{Path, PathBuf, absolute};

use clap::builder::{PathBufValueParser, TypedValueParser};

/// Reads a file's or a folder's path.
pub(crate) fn path() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(absolute)
}

/// Reads a program's path; a name without a slash is that of one in PATH.
pub(crate) fn program() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| if is_name(&path) { Ok(path) } else { absolute(path) })
}

fn is_name(path: &Path) -> bool {
    !path.as_os_str().as_encoded_bytes().contains(&b'/')
}

#[cfg(test)]
mod tests {
    use clap::{Arg, Command};

    use super::*;

    fn read(parser: impl TypedValueParser<Value = PathBuf>, given: &str) -> PathBuf {
        let command = Command::new("xtask").arg(Arg::new("path").value_parser(parser));
        command.get_matches_from(["xtask", given]).get_one::<PathBuf>("path").unwrap().clone()
    }

    #[test]
    fn paths_are_relative_to_where_the_user_stands() {
        let here = std::env::current_dir().unwrap();
        for (given, meant) in [("a.deb", "a.deb"), ("./a.deb", "a.deb"), ("b/a.deb", "b/a.deb"), ("/a.deb", "/a.deb")] {
            assert_eq!(read(path(), given), here.join(meant));
        }
        for (given, meant) in [("./qemu", "qemu"), ("build/qemu", "build/qemu"), ("/bin/qemu", "/bin/qemu")] {
            assert_eq!(read(program(), given), here.join(meant));
        }
        assert_eq!(read(program(), "qemu"), Path::new("qemu"));
    }
}
