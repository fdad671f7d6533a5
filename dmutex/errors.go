package dmutex

import (
	"errors"
	"fmt"

	"github.com/dchannel/dchannel"
)

// ErrFailedToLock is the error of Lock, TryLock and Do when the lock could not be had.
// What Err wraps tells why:
//
//   - dchannel.ErrLocked: it is held. If somebody else holds it, errors.As finds a
//     *dchannel.LockedError, which says who, under which fence, and for how long yet.
//   - the context's error: it ended first.
//   - dchannel.ErrInvalidOption: the ttl or an option cannot be used;
//     dchannel.ErrInvalidName: the key cannot.
//   - errors.ErrUnsupported: the backend has no locks, or no fair ones.
//   - dchannel.ErrChanClosed: the channel named after the key was closed.
//   - dchannel.ErrDetached: the Mutex was closed.
//   - dchannel.ErrUnavailable, dchannel.ErrRefused, dchannel.ErrBackendClosed: the backend's.
//   - dchannel.ErrUncertain, with one of the others: the lock is not held by the caller,
//     but may look held until the ttl is over.
type ErrFailedToLock struct {
	// Key is the Mutex's.
	Key string
	// Err is the cause.
	Err error
}

// Error tells the key and the cause.
func (e *ErrFailedToLock) Error() string {
	return fmt.Sprintf("dmutex: failed to lock %q: %v", e.Key, e.Err)
}

// Unwrap returns the cause.
func (e *ErrFailedToLock) Unwrap() error { return e.Err }

// ErrFailedToUnlock is the error of Unlock and ForceUnlock, and of a Do whose lock was
// over before its refresh. What Err wraps tells why:
//
//   - dchannel.ErrLockExpired: the time was over before.
//   - dchannel.ErrLockLost: somebody else has had the lock since, it was ended by force, or
//     the channel named after the key was closed.
//   - dchannel.ErrNotHeld, and neither of these: this Mutex was not locked.
//   - dchannel.ErrUnavailable, dchannel.ErrUncertain, dchannel.ErrRefused,
//     dchannel.ErrBackendClosed: the backend's. The lock is over for this process, and on
//     the server when its time is.
type ErrFailedToUnlock struct {
	// Key is the Mutex's.
	Key string
	// Err is the cause.
	Err error
}

// Error tells the key and the cause.
func (e *ErrFailedToUnlock) Error() string {
	return fmt.Sprintf("dmutex: failed to unlock %q: %v", e.Key, e.Err)
}

// Unwrap returns the cause.
func (e *ErrFailedToUnlock) Unwrap() error { return e.Err }

func (m *Mutex) failedToLock(err error) error {
	if err == nil {
		return nil
	}
	return &ErrFailedToLock{m.key, err}
}

func (m *Mutex) failedToUnlock(err error) error {
	if err == nil {
		return nil
	}
	return &ErrFailedToUnlock{m.key, err}
}

var (
	errNotLocked = fmt.Errorf("%w: this Mutex is not locked", dchannel.ErrNotHeld)
	errLocking   = fmt.Errorf("%w: another goroutine is about to lock this Mutex", dchannel.ErrLocked)
	errNilOption = fmt.Errorf("%w: an option is nil", dchannel.ErrInvalidOption)
)

// unsettled tells that err leaves open whether the lock was released.
func unsettled(err error) bool { return err != nil && !errors.Is(err, dchannel.ErrNotHeld) }
