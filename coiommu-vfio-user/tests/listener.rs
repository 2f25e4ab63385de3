//! The path where a client finds the server.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use coiommu_vfio_user::{ListenError, Listener};
use tempfile::TempDir;

fn place() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("device.sock");
    (folder, path)
}

#[test]
fn only_the_owner_can_connect() {
    let (_folder, path) = place();
    let listener = Listener::bind(&path).unwrap();
    assert_eq!(listener.path(), path);
    let metadata = fs::symlink_metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn clients_come_one_by_one() {
    let (_folder, path) = place();
    let listener = Listener::bind(&path).unwrap();
    assert!(listener.accept().unwrap().is_none());
    let client = UnixStream::connect(&path).unwrap();
    let served = listener.accept().unwrap().unwrap();
    let mut others = [(); 3].map(|()| UnixStream::connect(&path).unwrap());
    assert_eq!(listener.turn_away().unwrap(), 3);
    assert_eq!(listener.turn_away().unwrap(), 0);
    for other in &mut others {
        assert_eq!(other.read(&mut [0]).unwrap(), 0, "they see that it is in vain");
    }
    drop((client, served));
    let _next = UnixStream::connect(&path).unwrap();
    assert!(listener.accept().unwrap().is_some());
}

#[test]
fn what_a_server_left_behind_is_replaced() {
    let (_folder, path) = place();
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&path).unwrap();
    let _client = UnixStream::connect(&path).unwrap();
    assert!(listener.accept().unwrap().is_some());
}

#[test]
fn nothing_else_is() {
    let (folder, path) = place();
    let refused = |why: &str| {
        let error = Listener::bind(&path).unwrap_err();
        assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
        match (why, error) {
            ("in use", ListenError::InUse { .. }) | ("no socket", ListenError::NotASocket { .. }) => {}
            (_, error) => panic!("{error:?} is not {why:?}"),
        }
    };
    let server = Listener::bind(&path).unwrap();
    refused("in use");
    let _client = UnixStream::connect(&path).unwrap();
    assert!(server.accept().unwrap().is_some(), "one that looked");
    assert!(server.accept().unwrap().is_some(), "it still serves");
    // Even if too many wait.
    let _waiting: Vec<_> = (0..5).map(|_| UnixStream::connect(&path).unwrap()).collect();
    refused("in use");
    drop(server);

    fs::write(&path, "precious").unwrap();
    refused("no socket");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    fs::remove_file(&path).unwrap();

    fs::create_dir(&path).unwrap();
    refused("no socket");
    fs::remove_dir(&path).unwrap();

    let stale = folder.path().join("stale");
    drop(UnixListener::bind(&stale).unwrap());
    symlink(&stale, &path).unwrap();
    refused("no socket");
    assert!(stale.exists() && path.is_symlink());
    fs::remove_file(&stale).unwrap();
    refused("no socket");
}

#[test]
fn what_is_not_ours_any_more_stays() {
    let (_folder, path) = place();
    let listener = Listener::bind(&path).unwrap();
    fs::remove_file(&path).unwrap();
    File::create(&path).unwrap();
    drop(listener);
    assert!(path.exists());
}

#[test]
fn a_path_that_cannot_be_is_an_error() {
    let (folder, _) = place();
    for path in [folder.path().join("no/such/folder"), folder.path().join("x".repeat(200)), PathBuf::new()] {
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, ListenError::System { .. }), "{error:?}");
    }
}
