package dmutex

import (
	"context"
	"errors"

	"github.com/dchannel/dchannel"
)

// Do returns what read finds, and has one of all its callers, in all processes, make it by
// refresh if there is nothing: the others wait, and read what that one has made.
//
// read tells by its bool whether its value can be used. It is called without the lock,
// and again with it; so it must be safe for concurrent use, and should be quick. refresh
// is called by who holds the key's lock, after read has said no under the lock, at most
// once for each call of Do. It makes the value, stores it where read finds it, and returns
// it. Its context is ctx, and ends also when the lock is lost; context.Cause then says
// why. It passes fence on to what it writes to, which refuses what comes with a lower
// fence than it has seen: nothing else stops a refresh that does not look at its context.
//
// If the holder dies, its ttl runs out, and one of those who wait takes over. If its
// refresh fails, its Do returns that error as it is, and one of those who wait tries
// next. A refresh that ended after its lock was over may not have been alone: what counts
// is then what read finds, and if that is nothing Do returns the error of refresh, if
// any, and an [*ErrFailedToUnlock] that says how the lock was lost.
//
// Other errors are those of read, as they are, and an [*ErrFailedToLock] when the lock can
// neither be had nor waited for, which includes the end of ctx. A lock that could not be
// released, because the backend is away, is no error: it ends with its time.
//
// Do locks the key, but not m itself: Fence and Context of m are not about it, many
// goroutines can be in Do of one Mutex, and who calls Do while m is locked by itself waits
// for itself.
func Do[T any](ctx context.Context, m *Mutex, read func(ctx context.Context) (T, bool, error), refresh func(ctx context.Context, fence uint64) (T, error)) (T, error) {
	var none T
	for {
		if err := m.usable(ctx); err != nil {
			return none, m.failedToLock(err)
		}
		if v, ok, err := read(ctx); err != nil || ok {
			return v, err
		}
		v, held, err := doLocked(ctx, m, read, refresh)
		if held == 0 {
			return v, err
		}
		if _, err := m.ch.WaitFence(ctx, held); err != nil {
			return none, m.failedToLock(err)
		}
	}
}

// doLocked takes the lock, or returns the fence under which somebody else holds it. It
// does so on a handle of its own: a refresh that hangs keeps nobody else from taking over
// when its time is over, in this process either.
func doLocked[T any](ctx context.Context, m *Mutex, read func(ctx context.Context) (T, bool, error), refresh func(ctx context.Context, fence uint64) (T, error)) (v T, held uint64, err error) {
	var none T
	ch := m.channel()
	hold, err := ch.LockFor(ctx, m.ttl, m.lockOptions()...)
	if err != nil {
		give(ch)
		if locked := (*dchannel.LockedError)(nil); errors.As(err, &locked) {
			return none, locked.Fence, nil
		}
		return none, 0, m.failedToLock(err)
	}
	var watch *lossWatch
	if m.o.watch {
		watch = watchLoss(ch, hold)
	}
	released := false
	release := func() error {
		released = true
		err := ch.CloseLockedUntilContext(ctx) // if ctx has ended it goes on without it
		watch.join()
		if unsettled(err) {
			go give(ch)
			return nil
		}
		give(ch)
		return err
	}
	defer func() {
		if !released { // a panic, or runtime.Goexit
			_ = release()
		}
	}()

	work, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(hold.Context(), func() { cancel(context.Cause(hold.Context())) })()

	v, ok, err := read(work)
	if err == nil && !ok {
		v, err = refresh(work, hold.Fence())
	}
	lost := context.Cause(hold.Context())
	over := release()
	if over == nil && err != nil {
		over = lost // which may well be why it failed
	}
	if over == nil || ok && err == nil {
		return v, 0, err
	}
	if v, ok, again := read(ctx); again == nil && ok {
		return v, 0, nil
	}
	return none, 0, errors.Join(err, m.failedToUnlock(over))
}

// give gives a handle back. Its errors are about a release that has been told of, or that
// the ttl makes up for.
func give(ch *dchannel.Channel) { _ = ch.Detach() }
