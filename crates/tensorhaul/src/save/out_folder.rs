//! The folder that a checkpoint is written into: new or without one, and gone again if nothing is published.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::atomic::{Existing, NewFile, publish, write_error};
use crate::error::{Error, Result};

/// A folder that a checkpoint is written into. Folders that it made are removed again unless something
/// is published in them.
pub(crate) struct OutFolder {
    path: PathBuf,
    /// Innermost first.
    made: Vec<PathBuf>,
}

impl OutFolder {
    /// Makes the folder where it is missing, and checks that it holds no checkpoint.
    pub(crate) fn prepare(path: &Path) -> Result<OutFolder> {
        let missing = |path: &&Path| *path != Path::new("") && fs::symlink_metadata(path).is_err();
        let made = path.ancestors().take_while(missing).map(Path::to_owned).collect();
        let folder = OutFolder { path: path.to_owned(), made };
        fs::create_dir_all(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                Error::bad_request("is no folder to write into").in_file(path)
            }
            _ => write_error("making the folder", path, error),
        })?;
        let listing = |error| write_error("listing it", path, error);
        for entry in fs::read_dir(path).map_err(listing)? {
            let name = entry.map_err(listing)?.file_name();
            let name = name.to_string_lossy();
            if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
                let what = format!("holds {name:?} already; name a folder without a checkpoint");
                return Err(Error::bad_request(what).in_file(path));
            }
        }
        Ok(folder)
    }

    /// Returns the path of a new file of the folder.
    ///
    /// # Errors
    /// [`ErrorKind::BadRequest`](crate::ErrorKind::BadRequest) when something has its name: nothing is ever overwritten.
    pub(crate) fn new_path(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        match fs::symlink_metadata(&path) {
            Ok(_) => Err(Error::bad_request("exists already, and is not overwritten").in_file(path)),
            Err(_) => Ok(path),
        }
    }

    /// Gives the files their names, in this order.
    pub(crate) fn publish(mut self, files: Vec<NewFile>) -> Result<()> {
        publish(files, Existing::Kept)?;
        self.made.clear();
        Ok(())
    }
}

impl Drop for OutFolder {
    fn drop(&mut self) {
        for folder in &self.made {
            // A folder that somebody else put something into stays.
            let _ = fs::remove_dir(folder);
        }
    }
}
