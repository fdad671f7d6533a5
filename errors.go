package dchannel

import (
	"errors"
	"fmt"
	"strconv"
)

// Errors that callers tell apart with errors.Is. What a method returns wraps them
// with the operation, the channel and the cause.
var (
	// ErrChanClosed: the channel was closed, by anyone, and everything that was
	// accepted before has been delivered. Final for a handle that has seen it.
	ErrChanClosed = errors.New("channel closed")
	// ErrDetached: this handle was detached. The channel may well be open.
	ErrDetached = errors.New("handle detached")
	// ErrBackendClosed: the backend value was closed in this process.
	ErrBackendClosed = errors.New("backend closed")
	// ErrInvalidName: a channel name that is empty, longer than 255 bytes, not
	// UTF-8, or has control characters in it.
	ErrInvalidName = errors.New("invalid channel name")
	// ErrInvalidOption: an option, or the backend, cannot be used.
	ErrInvalidOption = errors.New("invalid option")
	// ErrTooLarge: the message is larger than the limit. Nothing was sent.
	ErrTooLarge = errors.New("message too large")
	// ErrCodec: the codec refused a value, or a received message could not be
	// decoded. A refused value was not sent; after an undecodable message, Listen
	// goes on with the next.
	ErrCodec = errors.New("codec failed")
	// ErrLost: messages are missing at this place. See [LostError].
	ErrLost = errors.New("messages lost")
	// ErrUnavailable: the backend cannot be reached or cannot work just now. What
	// was asked surely did not happen.
	ErrUnavailable = errors.New("backend unavailable")
	// ErrUncertain: what was asked may or may not have happened; nobody can tell
	// any more. All other errors of Publish mean: surely not sent.
	ErrUncertain = errors.New("outcome unknown")
	// ErrForgotten is the ErrUncertain of a retry that will never know more: what the
	// backend would need to look at is gone.
	ErrForgotten = fmt.Errorf("%w for good", ErrUncertain)
	// ErrRefused: the server answered and said no: password, permission, read-only,
	// out of memory. What was asked surely did not happen.
	ErrRefused = errors.New("refused by the server")
)

// LostError is returned by Listen at the very place where messages are missing.
// The next call goes on behind the gap. errors.Is(err, ErrLost) holds.
type LostError struct {
	// Channel is the channel's name.
	Channel string
	// Count is how many messages are missing; 0 when that is unknown, which is so
	// after the backend lost its state.
	Count uint64
	// After is the position of the last record before the gap, and Next that from
	// which delivery goes on (zero if nothing is there yet).
	After, Next Position
	// Cause says why, for people.
	Cause string
}

// Error tells channel, count and cause.
func (e *LostError) Error() string {
	n := "an unknown number of messages"
	if e.Count == 1 {
		n = "1 message"
	} else if e.Count > 1 {
		n = strconv.FormatUint(e.Count, 10) + " messages"
	}
	return "dchannel: " + n + " lost on " + strconv.Quote(e.Channel) + " after " + e.After.String() + ": " + e.Cause
}

// Unwrap returns ErrLost.
func (e *LostError) Unwrap() error { return ErrLost }
