package redis

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dchannel/dchannel"
)

// aside runs f on a goroutine of its own, because go-redis ignores a cancelled
// context while a reply is pending. When ctx or the backend ends first, aside returns
// that end's error, and f goes on by itself until go-redis gives up.
func aside[T any](ctx context.Context, b *Backend, f func() (T, error)) (v T, err error) {
	if err := b.enter(ctx); err != nil {
		return v, err
	}
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	go func() {
		defer b.running.Done()
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		var answer goredis.Error
		if r.err != nil && ctx.Err() != nil && !errors.As(r.err, &answer) {
			return r.v, ctx.Err() // and not what go-redis makes of it
		}
		return r.v, r.err
	case <-ctx.Done():
		err = ctx.Err()
	case <-b.done:
		err = dchannel.ErrBackendClosed
	}
	select {
	case r := <-done:
		return r.v, r.err
	default:
		return v, err
	}
}

// write is one command that changes something. It is sent at most once, and it is
// known whether it was.
//
// The last argument is a [encoding.BinaryMarshaler], which go-redis asks for its
// bytes as it writes the command: before that, the command is not complete, and the
// server surely does not run it. So a refused connection, a failed handshake and a
// full pool are told from a lost reply, which an error alone does not do; and a call
// whose context ends while it waits for a connection is withdrawn.
type write struct {
	cmd  []any
	last []byte

	state atomic.Int32
}

const (
	writeWaiting int32 = iota
	writeSent
	writeWithdrawn
)

var errWithdrawn = errors.New("withdrawn before it was sent")

// MarshalBinary is called by go-redis.
func (w *write) MarshalBinary() ([]byte, error) {
	if !w.state.CompareAndSwap(writeWaiting, writeSent) {
		return nil, errWithdrawn
	}
	return w.last, nil
}

// String keeps the payload out of the traces of go-redis' hooks.
func (w *write) String() string { return fmt.Sprintf("[%d bytes]", len(w.last)) }

// withdraw reports whether the command will surely never be sent.
func (w *write) withdraw() bool {
	return w.state.CompareAndSwap(writeWaiting, writeWithdrawn) || w.state.Load() == writeWithdrawn
}

// once is a command that go-redis does not repeat. By default it repeats one whose
// reply was lost up to three times, and then reports success: an append that ran
// twice.
type once struct{ *goredis.Cmd }

func (once) NoRetry() bool { return true }

// do runs w and maps its error.
func (b *Backend) do(ctx context.Context, w *write) (any, error) {
	v, err := aside(ctx, b, func() (any, error) { return b.send(ctx, w) })
	if err == nil {
		return v, nil
	}
	return nil, mapError(err, !w.withdraw())
}

func (b *Backend) send(ctx context.Context, w *write) (any, error) {
	cmd := once{goredis.NewCmd(ctx, append(w.cmd[:len(w.cmd):len(w.cmd)], w)...)}
	if err := b.client.Process(ctx, cmd); err != nil {
		return nil, err
	}
	return cmd.Val(), nil
}

// run is do for a script: by its hash, and by its text when the server does not know
// it, which it says without having run anything.
func (b *Backend) run(ctx context.Context, s script, keys []string, args []any, last []byte) (string, error) {
	w := &write{cmd: s.evalsha(keys, args), last: last}
	v, err := aside(ctx, b, func() (any, error) {
		v, err := b.send(ctx, w)
		if isNoScript(err) && w.state.CompareAndSwap(writeSent, writeWaiting) {
			w.cmd = s.eval(keys, args)
			v, err = b.send(ctx, w)
		}
		return v, err
	})
	if err != nil {
		return "", mapError(err, !w.withdraw())
	}
	text, ok := v.(string)
	if !ok {
		return "", fmt.Errorf("%w: the script's answer is a %T", dchannel.ErrUncertain, v)
	}
	return text, nil
}

// clock estimates the server's clock, so that an append can say when it was sent.
// The estimate errs to the past by at most the round trip that it was taken from.
type clock struct{ offset atomic.Int64 } // 0 is unknown

// slowReply is a round trip that is too slow to set a known clock by.
const slowReply = 250 * time.Millisecond

// now returns the server's time in milliseconds, and whether it is known.
func (b *Backend) now() (int64, bool) {
	offset := b.clock.offset.Load()
	return time.Since(b.start).Milliseconds() + offset, offset != 0
}

// told takes a server's time out of the answer to what was sent at the given time.
func (b *Backend) told(sent time.Time, ms int64) {
	if b.clock.offset.Load() == 0 || time.Since(sent) < slowReply {
		b.clock.offset.Store(ms - time.Since(b.start).Milliseconds())
	}
}
